// A slider over pictures that are already there; a kernel, where there is one, computes others.

function part(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function told(numbers) {
  return numbers.map(([name, value]) => `${name}: ${value}`).join("  ·  ");
}

function table(model) {
  const frames = model.get("frames");
  const columns = frames[0].numbers.map(([name]) => name);
  const head = part("tr", {}, part("th", { scope: "col" }, model.get("label")));
  for (const name of columns) head.append(part("th", { scope: "col" }, name));
  const body = part("tbody");
  for (const frame of frames) {
    const row = part("tr", {}, part("th", { scope: "row" }, frame.name));
    for (const [, value] of frame.numbers) row.append(part("td", {}, value));
    body.append(row);
  }
  return part("table", {}, part("thead", {}, head), body);
}

function render({ model, el }) {
  const label = model.get("label");
  const range = part("input", { type: "range", min: 0, step: 1, "aria-label": label });
  const value = part("output", { class: "gi-value", "aria-hidden": "true" });
  const picture = part("img");
  const line = part("figcaption", { class: "gi-numbers", "aria-live": "polite" });
  const numbers = part("div", { class: "gi-table", tabindex: 0, role: "region", "aria-label": `Numbers: ${label}` });
  const other = part("input", { type: "number", step: "any", "aria-label": `Another value of ${label}` });
  const compute = part("button", { type: "button" }, "Compute");
  const live = part("div", { class: "gi-live", hidden: "" }, part("span", {}, "Another value: "), other, compute);

  function show() {
    const frames = model.get("frames");
    const index = Math.min(model.get("index"), frames.length - 1);
    const frame = frames[index];
    range.max = frames.length - 1;
    range.value = index;
    range.setAttribute("aria-valuetext", `${frame.name}. ${frame.alt}`);
    value.textContent = frame.name;
    picture.src = frame.src;
    picture.alt = frame.alt;
    line.textContent = told(frame.numbers);
  }
  function fill() {
    numbers.replaceChildren(table(model));
    show();
  }
  function ask() {
    if (other.value === "") return;
    compute.disabled = true;
    model.send({ compute: Number(other.value) });
  }

  range.addEventListener("input", () => {
    model.set("index", Number(range.value));
    model.save_changes();
    show();
  });
  compute.addEventListener("click", ask);
  other.addEventListener("keydown", (event) => event.key === "Enter" && ask());
  model.on("change:index", show);
  model.on("change:frames", fill);
  // Only a kernel answers: without one the field for other values stays away.
  model.on("msg:custom", (message) => {
    compute.disabled = false;
    if (message.live) live.hidden = false;
    if (message.error) line.textContent = message.error;
  });
  model.send({ hello: true });

  const row = part("div", { class: "gi-row" }, part("span", { class: "gi-label" }, label), range, value);
  const folded = part("details", {}, part("summary", {}, "The numbers of every frame"), numbers);
  el.append(part("figure", { class: "gi-widget gi-slider" }, row, picture, line, live, folded));
  fill();
}

export default { render };
