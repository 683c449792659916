"""What holds for all tests."""

from hypothesis import settings

# A busy machine is no bug: tests judge results, not times.
settings.register_profile("caravan", deadline=None)
settings.load_profile("caravan")
