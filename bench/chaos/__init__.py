"""``tandem bench chaos``: a mixed load on a stack whose processes die and stop, and whose network fails; each answer
judged.

Knows requests, answers, the schedule of faults and their sums, and how to spoil a TCP connection. What a stack is, and
how it is harmed, is behind ``bench.chaos.faults.Stack``.
"""
