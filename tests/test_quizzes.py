"""The questions of each chapter: well formed, hidden, without drift, and answered by a click."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import guide
import pytest

from gradinv_edu.errors import InvalidArgumentError, UnknownNameError
from gradinv_edu.kit import quiz
from gradinv_edu.kit.quiz import Question, Quiz

ROOT = Path(__file__).parents[1]
CHAPTERS = {path.stem: path for path in guide.chapters(ROOT / "exercises")}
QUIZZES = {stem: quiz.load(stem) for stem in quiz.names()}
QUESTIONS = [question for q in QUIZZES.values() for question in q.questions]
CODE = re.compile(r"<(style|script)>.*?</\1>", re.DOTALL)
TAG = re.compile(r"<[^>]+>")
THINKING = re.compile(r"^## (To think about|Questions to think about)", re.MULTILINE)
BUILT = ROOT / "_build" / "html"
each_quiz = pytest.mark.parametrize("stem", QUIZZES)


def _cells(stem: str) -> list[dict[str, Any]]:
    return json.loads((ROOT / "book" / f"{stem}.ipynb").read_text())["cells"]


def _secrets(stem: str) -> list[str]:
    """What a reader is told only after choosing, as it would stand in a page."""
    choices = [choice for question in QUIZZES[stem].questions for choice in question.choices]
    said = [text for choice in choices for text in (choice.because, choice.misconception)]
    return [form for text in said if len(text) > 12 for form in (text, quiz.inline(text))]


def test_neither_place_nor_length_gives_the_answer_away() -> None:
    places = Counter([c.right for c in q.choices].index(True) for q in QUESTIONS)
    assert max(places.values()) < 0.45 * len(QUESTIONS)
    lengths = [[len(c.text) for c in sorted(q.choices, key=lambda c: c.right)] for q in QUESTIONS]
    assert sum(line[-1] == max(line) for line in lengths) < 0.6 * len(QUESTIONS)
    assert {stem for stem in CHAPTERS if stem < "17"} <= set(QUIZZES) <= set(CHAPTERS)


@each_quiz
def test_a_quiz_is_whole(stem: str) -> None:
    """One right answer a question, every other explained, every objective covered."""
    questions = QUIZZES[stem].questions
    assert 3 <= len(questions) <= 6
    for question in questions:
        choices = question.choices
        assert sum(choice.right for choice in choices) == 1
        assert len({choice.text for choice in choices}) == len(choices) >= 3
        assert all(len(choice.because.split()) >= 4 for choice in choices)
    wrong = [c.misconception for q in questions for c in q.choices if not c.right]
    assert all(len(idea.split()) >= 2 for idea in wrong)
    assert len(set(wrong)) == len(wrong)  # no misconception is told twice in a chapter
    covered = guide.coverage(CHAPTERS[stem], ROOT / "exercises")
    assert len(covered) >= 3
    assert not [objective for objective, trained, tested in covered if not trained + tested]
    assert {n for q in questions for n in q.objectives} <= set(range(1, len(covered) + 1))


@each_quiz
def test_the_chapter_shows_its_quiz_and_no_answer(stem: str) -> None:
    """If this fails after a change of a quiz: make execute CHAPTERS=book/NN_stem.ipynb."""
    cells, made = _cells(stem), QUIZZES[stem]._repr_html_()
    (place,) = [i for i, cell in enumerate(cells) if "quiz.load(" in "".join(cell["source"])]
    (output,) = cells[place]["outputs"]
    assert "".join(output["data"]["text/html"]) == made
    thinking = [i for i, cell in enumerate(cells) if THINKING.search("".join(cell["source"]))]
    assert thinking == [place + 1]
    shown, cell = CODE.sub("", made), json.dumps(cells[place], ensure_ascii=False)
    assert quiz.inline(QUIZZES[stem].questions[0].ask) in shown
    assert not [secret for secret in _secrets(stem) if secret in shown or secret in cell]
    assert "misconception" not in json.dumps(cells, ensure_ascii=False)
    buttons = re.findall(r"<button[^>]*>", shown)
    assert len({re.sub(r'data-say="[\w+/=]+"', "", b) for b in buttons}) == 1  # all look alike
    assert not re.search(r"https?:|src=|href=|@import|url\(|fetch\(|XMLHttp", made)


@each_quiz
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
    assert repr(Quiz("07_batches", ())) == "0 questions on chapter 7"


@pytest.fixture(scope="module")
def page() -> Any:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    playwright = pytest.importorskip("playwright.sync_api")
    if not chromium:
        pytest.skip("this machine has no Chromium")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        tab = browser.new_page()
        tab.set_content(f"<main><h1>Quiz</h1>{QUIZZES['01_perceptron']._repr_html_()}</main>")
        yield tab
        browser.close()


def _button(page: Any, question: Question, right: bool) -> Any:
    place = [choice.right for choice in question.choices].index(right)
    return page.locator(".gi-question").first.locator("button").nth(place)


def test_a_click_explains_and_counts(page: Any) -> None:
    first = QUIZZES["01_perceptron"].questions[0]
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
