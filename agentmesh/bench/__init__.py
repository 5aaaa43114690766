"""Measurements that the documentation quotes; every one compares ways within one run."""
