"""The maths of one step on one device. Knows tensors; knows nothing of requests."""
