"""Tests of clustax, which mirror the package."""
