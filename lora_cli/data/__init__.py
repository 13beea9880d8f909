"""Rows from files (rows), what they say (formats), their tokens and masks (encoding), and batches."""
