"""Images: the check of a header, decoding, resizing."""
