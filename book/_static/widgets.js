// Shows the widgets that a notebook stored, without a kernel and without a widget manager:
// each brings its own module, anywidget's way, and this gives it the state to show.
const VIEW = 'script[type="application/vnd.jupyter.widget-view+json"]';
const STATE = 'script[type="application/vnd.jupyter.widget-state+json"]';

function stored(state) {
  const heard = {};
  return {
    get: (name) => state[name],
    set(name, value) {
      state[name] = value;
      for (const call of heard[`change:${name}`] ?? []) call();
    },
    on: (name, call) => (heard[name] ??= []).push(call),
    off() {},
    save_changes() {},
    send() {}, // nobody is there to answer
  };
}

async function show(view, states) {
  const state = states[JSON.parse(view.textContent).model_id].state;
  const url = URL.createObjectURL(new Blob([state._esm], { type: "text/javascript" }));
  const { default: widget } = await import(url);
  const [style, el] = [document.createElement("style"), document.createElement("div")];
  style.textContent = state._css;
  view.after(style, el);
  await widget.render({ model: stored(state), el });
}

async function showAll() {
  const states = JSON.parse(document.querySelector(STATE)?.textContent ?? "{}").state ?? {};
  for (const view of document.querySelectorAll(VIEW)) await show(view, states);
}

window.addEventListener("DOMContentLoaded", showAll);
