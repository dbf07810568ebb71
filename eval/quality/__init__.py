"""What perplexities, reports and generation checks are made of."""
