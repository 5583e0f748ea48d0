"""Measures this machine's GPU as Tandem uses it, from inside: kernels, steps, hand-offs, and then the whole stack.

Everything is a ratio within one run: to what the device's memory and matrix units did in the same run, to other
libraries, or to the same work without what is looked at. Without a GPU it runs at toy size on Triton's interpreter,
where exactness is checked all the same and times mean nothing.
"""
