"""What transformers calls for ``attn_implementation="paged_flash"``."""
