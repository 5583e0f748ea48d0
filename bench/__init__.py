"""Measures any server that speaks OpenAI's API, Tandem or another, and compares two results.

Knows HTTP, streams and statistics; knows nothing of how Tandem works inside, ``bench.gpu`` excepted.
"""
