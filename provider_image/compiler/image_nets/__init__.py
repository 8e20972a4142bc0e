"""Builders of users' nets that take an image and return one."""
