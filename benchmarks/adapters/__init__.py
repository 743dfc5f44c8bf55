"""Adapters to published code: each calls public functions of a checkout that the user has.

========================== ============================================ ========= ==========
option                     repository on GitHub                         commit    date
========================== ============================================ ========= ==========
``--rgap``                 JunyiZhu-AI/R-GAP                            b842eca   2021-02-02
``--breaching``            JonasGeiping/breaching                       8bd99d5   2024-04-17
``--dlg``                  mit-han-lab/dlg                              d21007f   2020-02-12
``--inverting-gradients``  JonasGeiping/invertinggradients              1157b61   2022-02-16
========================== ============================================ ========= ==========

These are the commits measured: ``git clone`` a repository, ``git checkout`` the commit, and name
the folder. For ``breaching``, a folder of installed packages that holds it will do as well; it
needs ``hydra-core``, in the Python that ``--python`` names (which needs this project's packages
too). Nothing of theirs is kept in this project.
"""

from __future__ import annotations

from benchmarks.adapters import breaching, dlg, inverting_gradients, own, rgap
from benchmarks.cases import System

SYSTEMS: dict[str, System] = {
    **own.SYSTEMS,
    **rgap.SYSTEMS,
    **breaching.SYSTEMS,
    **dlg.SYSTEMS,
    **inverting_gradients.SYSTEMS,
}
