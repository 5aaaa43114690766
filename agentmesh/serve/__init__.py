"""A mesh as a service: an OpenAI-compatible API, a native one with the run's events, and a page that shows runs."""
