(function () {
  const read = (text) =>
    JSON.parse(new TextDecoder().decode(Uint8Array.from(atob(text), (c) => c.charCodeAt(0))));

  function start(quiz) {
    const questions = [...quiz.querySelectorAll(".gi-question")];
    const tries = questions.map(() => 0);
    const solved = questions.map(() => 0);
    const score = quiz.querySelector(".gi-quiz-score");
    questions.forEach((question, place) => {
      const say = question.querySelector(".gi-say");
      const buttons = question.querySelectorAll("button");
      buttons.forEach((button) => button.addEventListener("click", () => {
        const [because, idea, right] = read(button.dataset.say);
        const verdict = right ? "right" : "wrong";
        buttons.forEach((other) => other.setAttribute("aria-pressed", String(other === button)));
        button.dataset.verdict = verdict;
        say.dataset.verdict = verdict;
        say.innerHTML = right
          ? "<b>Right.</b> " + because
          : "<b>Not quite.</b> The idea behind it: <i>" + idea + "</i>. " + because;
        if (!solved[place]) {
          tries[place] += 1;
          solved[place] = right ? tries[place] : 0;
        }
        const done = solved.filter((n) => n > 0).length;
        const first = solved.filter((n) => n === 1).length;
        score.textContent =
          done + " of " + questions.length + " answered, " + first + " at the first try.";
      }));
    });
  }

  document.querySelectorAll(".gi-quiz:not([data-ready])").forEach((quiz) => {
    quiz.dataset.ready = "yes";
    start(quiz);
  });
})();
