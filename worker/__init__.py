"""What the prefill and the decode tier share: an engine behind asyncio, and the routers it serves."""
