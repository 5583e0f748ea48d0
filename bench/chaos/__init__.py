"""``tandem bench chaos``: a mixed load on a stack whose processes die, stop and restart, each answer judged.

Knows requests, answers, the schedule of faults and their sums. What a stack is, and how it is harmed, is behind
``bench.chaos.faults.Stack``.
"""
