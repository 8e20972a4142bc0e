"""Images: the check of their headers, decoding, and the format of resized ones."""
