"""Hypothesis: fresh examples on every run, the failing one printed as a blob that reproduces it."""

import os

import hypothesis

hypothesis.settings.register_profile("cuflash", deadline=None, print_blob=True)
# compute-sanitizer slows a kernel a hundredfold: the same properties on fewer examples
hypothesis.settings.register_profile("sanitizer", deadline=None, print_blob=True, max_examples=8)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "cuflash"))
