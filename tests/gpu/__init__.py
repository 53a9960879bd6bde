"""Tests that need a GPU; files here may be named as their siblings in tests/cpu are."""
