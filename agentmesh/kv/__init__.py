"""Keys and values as tensors: values, rotation, the arena."""
