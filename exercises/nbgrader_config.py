"""The settings that make this folder an nbgrader course, for handing out and collecting.

Marks come from ``grade.py``: nbgrader would run checks in the student's own process.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from editions import STUB, TEXT_STUB, sources  # noqa: E402

for source in sources(HERE):  # what lies beside a source is handed out: the students' checks
    checks = HERE / "student" / source.stem / "checks"
    shutil.copytree(checks, source.parent / "checks", dirs_exist_ok=True)

c = get_config()  # noqa: F821  nbgrader defines it where it reads this file

c.CourseDirectory.course_id = "what-gradients-reveal"
c.CourseDirectory.root = str(HERE)
c.ClearSolutions.code_stub = {"python": STUB}
c.ClearSolutions.text_stub = TEXT_STUB
c.NbGrader.logfile = ""
