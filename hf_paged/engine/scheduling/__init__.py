"""Which sequences run, and on which pages. No tensors of the model here."""
