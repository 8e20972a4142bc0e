"""How images come in: uploads, batches, images fetched by URL, and the options of a request."""
