"""Running a model: loading, probing, sparse prefill, decoding. The only place that imports transformers."""
