"""The settings that make this folder an nbgrader course.

nbgrader hands out and grades with the files beside each source: the checks are put there first.
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from editions import STUB, TEXT_STUB, checks_of, put, sources  # noqa: E402

for source in sources(HERE):
    put(checks_of(source.stem, source.parent))

c = get_config()  # noqa: F821  nbgrader defines it where it reads this file

c.CourseDirectory.course_id = "what-gradients-reveal"
c.CourseDirectory.root = str(HERE)
# The stubs of the committed student edition, so that both editions are the same.
c.ClearSolutions.code_stub = {"python": STUB}
c.ClearSolutions.text_stub = TEXT_STUB
c.ExecutePreprocessor.timeout = 240
c.NbGrader.logfile = ""
