"""OpenAI's endpoints, one file each: parse, prepare the prompt, start the flow, shape the answer."""
