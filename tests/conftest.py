"""For all tests: hypothesis draws as much as it is told, however slow the machine is at the moment."""

from hypothesis import settings

settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")
