"""Exercises that grade themselves: what the checks say, and the editions of the notebooks.

One module a chapter holds its checks; :mod:`gradinv_edu.coursework.editions` makes the student
edition and the solutions out of the one source, :mod:`gradinv_edu.coursework.guide` the tables
of the instructor's guide. ``python -m gradinv_edu.coursework`` writes them all.
"""
