"""The questions of each chapter: well formed, hidden, without drift, and answered by a click."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from gradinv_edu.coursework import guide, quiz
from gradinv_edu.coursework.quiz import Question, Quiz
from gradinv_edu.errors import InvalidArgumentError, UnknownNameError

ROOT = Path(__file__).parents[1]
CHAPTERS = guide.chapters(ROOT / "exercises")
STEMS = quiz.names()
QUIZZED = [path for path in CHAPTERS if path.stem in STEMS]
QUESTIONS = [
    (stem, place, q) for stem in STEMS for place, q in enumerate(quiz.load(stem).questions)
]
CODE = re.compile(r"<(style|script)>.*?</\1>", re.DOTALL)
THINKING = re.compile(r"^## (To think about|Questions to think about)", re.MULTILINE)

Case = tuple[str, int, Question]


def _named(case: Case) -> str:
    return f"{case[0]}-Q{case[1] + 1}"


def _cells(stem: str) -> list[dict[str, Any]]:
    return json.loads((ROOT / "book" / f"{stem}.ipynb").read_text())["cells"]


def _secrets(stem: str) -> list[str]:
    """What a reader is told only after choosing, as it would stand in a page."""
    choices = [choice for question in quiz.load(stem).questions for choice in question.choices]
    said = [text for choice in choices for text in (choice.because, choice.misconception)]
    return [form for text in said if len(text) > 12 for form in (text, quiz.inline(text))]


def test_every_chapter_has_its_questions() -> None:
    assert set(STEMS) <= {path.stem for path in CHAPTERS}
    assert {path.stem for path in CHAPTERS if path.stem < "13"} <= set(STEMS)
    assert all(3 <= len(quiz.load(stem).questions) <= 5 for stem in STEMS)


@pytest.mark.parametrize("case", QUESTIONS, ids=_named)
def test_a_question_has_one_right_answer_and_explains_every_other(case: Case) -> None:
    choices = case[2].choices
    assert sum(choice.right for choice in choices) == 1
    assert len(choices) >= 3
    assert len({choice.text for choice in choices}) == len(choices)
    assert all(len(choice.because.split()) >= 4 for choice in choices)
    wrong = [choice for choice in choices if not choice.right]
    assert all(len(choice.misconception.split()) >= 2 for choice in wrong)


def test_no_misconception_is_told_twice_in_a_chapter() -> None:
    for stem in STEMS:
        choices = [c for question in quiz.load(stem).questions for c in question.choices]
        ideas = Counter(choice.misconception for choice in choices if not choice.right)
        assert max(ideas.values()) == 1


def test_neither_place_nor_length_gives_the_answer_away() -> None:
    questions = [question for _, _, question in QUESTIONS]
    places = Counter([c.right for c in question.choices].index(True) for question in questions)
    assert max(places.values()) < 0.45 * len(questions)
    lengths = [[len(c.text) for c in sorted(q.choices, key=lambda c: c.right)] for q in questions]
    longest = sum(line[-1] == max(line) for line in lengths)
    assert longest < 0.6 * len(questions)


@pytest.mark.parametrize("chapter", QUIZZED, ids=lambda path: path.stem)
def test_every_objective_is_covered_by_an_exercise_or_a_question(chapter: Path) -> None:
    covered = guide.coverage(chapter, ROOT / "exercises")
    assert len(covered) >= 3
    assert not [objective for objective, trained, tested in covered if not trained + tested]
    numbers = {n for q in quiz.load(chapter.stem).questions for n in q.objectives}
    assert numbers <= set(range(1, len(covered) + 1))


@pytest.mark.parametrize("stem", STEMS)
def test_the_chapter_shows_its_quiz_before_the_things_to_think_about(stem: str) -> None:
    """If this fails after a change of a quiz: make execute CHAPTERS=book/NN_stem.ipynb."""
    cells = _cells(stem)
    shown = [i for i, cell in enumerate(cells) if "quiz.load(" in "".join(cell["source"])]
    assert len(shown) == 1
    (output,) = cells[shown[0]]["outputs"]
    assert "".join(output["data"]["text/html"]) == quiz.load(stem)._repr_html_()
    thinking = [i for i, cell in enumerate(cells) if THINKING.search("".join(cell["source"]))]
    assert thinking == [shown[0] + 1]


@pytest.mark.parametrize("stem", STEMS)
def test_answers_are_not_readable_in_the_chapter(stem: str) -> None:
    text = json.dumps(_cells(stem), ensure_ascii=False)
    shown = CODE.sub("", quiz.load(stem)._repr_html_())
    assert quiz.inline(quiz.load(stem).questions[0].ask) in shown
    assert not [secret for secret in _secrets(stem) if secret in shown]
    quizzed = [c for c in _cells(stem) if "quiz.load(" in "".join(c["source"])]
    assert not [s for s in _secrets(stem) if s in json.dumps(quizzed, ensure_ascii=False)]
    assert "misconception" not in text
    attributes = {
        re.sub(r'data-say="[\w+/=]+"', "", b) for b in re.findall(r"<button[^>]*>", shown)
    }
    assert len(attributes) == 1  # right and wrong answers look alike


@pytest.mark.parametrize("stem", STEMS)
def test_a_quiz_asks_nothing_of_the_network(stem: str) -> None:
    shown = quiz.load(stem)._repr_html_()
    assert not re.search(r"https?:|src=|href=|@import|url\(|fetch\(|XMLHttp", shown)


BUILT = ROOT / "_build" / "html"


@pytest.mark.parametrize("stem", STEMS)
def test_answers_are_not_readable_in_the_built_book(stem: str) -> None:
    """The page, and the search index, if the book is built."""
    page = BUILT / "book" / f"{stem}.html"
    if not page.exists() or "gi-quiz" not in page.read_text():
        pytest.skip("the book is not built")
    content = page.read_text()
    quizzed = content[content.index('<div class="gi-quiz"') :]
    quizzed = quizzed[: quizzed.index("</script>")]
    index = (BUILT / "searchindex.js").read_text()
    assert not [s for s in _secrets(stem) if s in quizzed or s in index]
    assert "quiz.load" not in TAG.sub("", content)  # the cell that shows it stays out of sight


TAG = re.compile(r"<[^>]+>")


def test_an_unknown_chapter_is_named() -> None:
    with pytest.raises(UnknownNameError, match="no quiz '99_nothing'; there are 00_sharing"):
        quiz.load("99_nothing")


def test_a_question_that_lacks_something_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "01_x.toml").write_text('[[question]]\nask = "Why?"\nright = "a"\n')
    monkeypatch.setattr(quiz, "FOLDER", tmp_path)
    with pytest.raises(InvalidArgumentError, match="01_x has no 'because'"):
        quiz.load("01_x")


def test_marks_become_html_and_all_else_is_text() -> None:
    made = quiz.inline("*k*_{below} < `x` & 2^{3}")
    assert made == "<i>k</i><sub>below</sub> &lt; <code>x</code> &amp; 2<sup>3</sup>"


def test_a_quiz_says_what_it_is() -> None:
    assert repr(Quiz("03_batches", ())) == "0 questions on chapter 3"


@pytest.fixture(scope="module")
def page() -> Any:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    playwright = pytest.importorskip("playwright.sync_api")
    if not chromium:
        pytest.skip("this machine has no Chromium")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        tab = browser.new_page()
        tab.set_content(f"<main><h1>Quiz</h1>{quiz.load('01_perceptron')._repr_html_()}</main>")
        yield tab
        browser.close()


def _button(page: Any, question: Question, right: bool) -> Any:
    place = [choice.right for choice in question.choices].index(right)
    return page.locator(".gi-question").first.locator("button").nth(place)


def test_a_click_explains_and_counts(page: Any) -> None:
    first = quiz.load("01_perceptron").questions[0]
    said, score = page.locator(".gi-say").first, page.locator(".gi-quiz-score")
    wrong = next(choice for choice in first.choices if not choice.right)
    _button(page, first, right=False).click()
    assert said.inner_text().startswith("Not quite.") and wrong.misconception in said.inner_text()
    assert score.inner_text() == "0 of 5 answered, 0 at the first try."
    _button(page, first, right=True).focus()
    page.keyboard.press("Enter")
    assert said.inner_text().startswith("Right.")
    assert score.inner_text() == "1 of 5 answered, 0 at the first try."


def test_a_quiz_is_accessible(page: Any) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    found = axe.Axe().run(page, context=".gi-quiz")
    assert not found.response["violations"], found.generate_report()
