"""The prefill tier: computes prompts, hands their KV over."""
