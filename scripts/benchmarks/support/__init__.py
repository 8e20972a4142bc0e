"""What benchmarks share: timing and tables, images, servers, homes with requests, the page."""
