"""The service over HTTP and its page: routes, batches, limits, and what is served."""
