"""The settings that make this folder an nbgrader course."""

from __future__ import annotations

from pathlib import Path

from gradinv_edu.coursework.editions import STUB, TEXT_STUB

c = get_config()  # noqa: F821  nbgrader defines it where it reads this file

c.CourseDirectory.course_id = "what-gradients-reveal"
c.CourseDirectory.root = str(Path(__file__).resolve().parent)
# The stubs of the committed student edition, so that both editions are the same.
c.ClearSolutions.code_stub = {"python": STUB}
c.ClearSolutions.text_stub = TEXT_STUB
c.ExecutePreprocessor.timeout = 240
c.NbGrader.logfile = ""
