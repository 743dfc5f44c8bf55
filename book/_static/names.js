// Names for the theme's own controls, for readers who hear the page instead of seeing it.
function nameControls() {
  for (const summary of document.querySelectorAll(".bd-sidebar-primary summary")) {
    const link = summary.closest("li")?.querySelector(":scope > a");
    summary.setAttribute("aria-label", `Pages under ${link ? link.textContent.trim() : "this one"}`);
  }
  for (const button of document.querySelectorAll("button[title]:not([aria-label])")) {
    button.setAttribute("aria-label", button.title);
  }
  // A list may hold list items only; entries of a bibliography have a role of their own.
  for (const list of document.querySelectorAll(".citation-list[role=list]")) list.removeAttribute("role");
  // Parameters of a signature, one a line, are written as descriptions of nothing: make them a list.
  for (const list of document.querySelectorAll("dt.sig > dl")) {
    const parameters = document.createElement("ul");
    for (const entry of list.children) {
      const item = document.createElement("li");
      item.append(...entry.childNodes);
      parameters.append(item);
    }
    list.replaceWith(parameters);
  }
  // Sentences that a cell prints may wrap on a phone; columns and matrices keep their lines.
  for (const box of document.querySelectorAll(".cell_output pre:not(.sentences, :has(.sentence))")) {
    const lines = box.textContent.split("\n");
    const wraps = lines.map((line) => line.length > 70 || !/\S {2,}\S|^ *(tensor\()?\[/.test(line));
    if (wraps.every(Boolean)) box.classList.add("sentences");
    else if (![...box.children].some((child) => child.textContent)) {
      box.replaceChildren(...lines.flatMap((line, i) => {
        const part = document.createElement("span");
        if (wraps[i]) part.className = "sentence";
        part.textContent = line;
        return i ? ["\n", part] : [part];
      }));
    }
  }
  // What scrolls must be reachable from the keyboard.
  for (const box of document.querySelectorAll(".bd-article :is(pre, div.math, .cell_output .text_html)")) {
    if (box.scrollWidth > box.clientWidth + 1) box.tabIndex = 0;
  }
}
window.addEventListener("load", () => {
  nameControls();
  window.MathJax?.startup?.promise?.then(nameControls);
});
window.addEventListener("resize", nameControls);
// Paper is white: print by day, whatever the screen shows.
let byScreen;
window.addEventListener("beforeprint", () => {
  byScreen = document.documentElement.dataset.theme;
  document.documentElement.dataset.theme = "light";
});
window.addEventListener("afterprint", () => {
  document.documentElement.dataset.theme = byScreen;
});
