// A neuron in the page: what is drawn, the gradient that a client sends, what a server makes of it.

// Digits after the leading bit, and the exponent of the smallest normal number.
const FORMATS = { float64: null, float32: [23, -126], bfloat16: [7, -126], float16: [10, -14] };

function evenly(quotient) {
  const whole = Math.round(quotient);
  return Math.abs(quotient % 1) === 0.5 && whole % 2 ? whole - 1 : whole;
}

export function rounded(value, format) {
  if (!FORMATS[format] || value === 0) return value;
  const [digits, lowest] = FORMATS[format];
  const exponent = Math.max(Math.floor(Math.log2(Math.abs(value))), lowest);
  const step = 2 ** (exponent - digits);
  return evenly(value / step) * step;
}

// z = W·x + b, k = σ(z) − y, ∂L/∂W = k x, ∂L/∂b = k.
export function gradient(weight, bias, x, y) {
  const z = weight.reduce((sum, w, i) => sum + w * x[i], bias);
  const k = y ? -1 / (1 + Math.exp(z)) : 1 / (1 + Math.exp(-z));
  return { weight: x.map((value) => k * value), bias: k };
}

export function sent({ weight, bias }, noise, sigma, format) {
  const entry = (value, i) => rounded(value + sigma * noise[i], format);
  return { weight: weight.map(entry), bias: entry(bias, weight.length) };
}

// x = (∂L/∂W) / (∂L/∂b); null where the divisor is zero.
export function recovered({ weight, bias }) {
  return bias === 0 ? null : weight.map((value) => value / bias);
}

export function relativeError(answer, truth) {
  const length = (values) => Math.hypot(...values);
  return length(answer.map((value, i) => value - truth[i])) / length(truth);
}

// The same draws every time, so that only what a reader moves changes the picture.
export function gaussians(count, seed = 7) {
  let state = seed;
  const uniform = () => {
    state = (state + 0x6d2b79f5) | 0;
    let t = Math.imul(state ^ (state >>> 15), 1 | state);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
  };
  const one = () => Math.sqrt(-2 * Math.log(1 - uniform())) * Math.cos(2 * Math.PI * uniform());
  return Array.from({ length: count }, one);
}

function part(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function paint(canvas, values, side) {
  const image = new ImageData(side, side);
  values.forEach((value, i) => {
    const grey = Math.round(255 * Math.min(1, Math.max(0, value)));
    image.data.set([grey, grey, grey, 255], 4 * i);
  });
  canvas.getContext("2d").putImageData(image, 0, 0);
}

function stretched(values) {
  const low = Math.min(...values);
  const high = Math.max(...values);
  return values.map((value) => (high > low ? (value - low) / (high - low) : 0.5));
}

// The power of ten that makes a difference visible, as in the book's other figures.
function enlargement(difference) {
  const typical = Math.sqrt(difference.reduce((sum, d) => sum + d * d, 0) / difference.length);
  return typical > 0 && typical < Infinity ? 10 ** Math.max(0, Math.min(300, Math.floor(-Math.log10(typical)))) : 1;
}

async function readPicture(file, side) {
  const bitmap = await createImageBitmap(file);
  const canvas = new OffscreenCanvas(side, side);
  const context = canvas.getContext("2d");
  const edge = Math.min(bitmap.width, bitmap.height);
  const [left, top] = [(bitmap.width - edge) / 2, (bitmap.height - edge) / 2];
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, left, top, edge, edge, 0, 0, side, side);
  const { data } = context.getImageData(0, 0, side, side);
  return Array.from({ length: side * side }, (_, i) =>
    (0.299 * data[4 * i] + 0.587 * data[4 * i + 1] + 0.114 * data[4 * i + 2]) / 255);
}

function panel(canvas, title) {
  return part("div", { class: "gi-panel" }, canvas, title);
}

function render({ model, el }) {
  const side = model.get("side");
  const weight = model.get("weight");
  const examples = model.get("examples");
  const noise = gaussians(weight.length + 1);
  const sigmas = [0, 1e-4, 1e-3, 1e-2, 3e-2, 1e-1, 1];
  let x = [...model.get("picture")];
  let cursor = [side >> 1, side >> 1];

  const still = () => part("canvas", { width: side, height: side, role: "img" });
  const pad = part("canvas", {
    width: side, height: side, tabindex: 0, role: "application", class: "gi-draw",
    "aria-label": `Drawing area, ${side} by ${side} pixels. Arrow keys move the pen; space draws, backspace wipes.`,
  });
  const [message, answer, difference] = [still(), still(), still()];
  const gain = part("p", {}, "difference");
  const status = part("p", { class: "gi-numbers", "aria-live": "polite" });
  const sure = part("input", { type: "range", min: -5, max: 40, step: 1, value: 0, "aria-label": "Bias b of the neuron" });
  const sureValue = part("output", { class: "gi-value", "aria-hidden": "true" });
  const noisy = part("input", { type: "range", min: 0, max: sigmas.length - 1, step: 1, value: 0, "aria-label": "Noise σ on every number sent" });
  const noisyValue = part("output", { class: "gi-value", "aria-hidden": "true" });
  const format = part("select", { "aria-label": "Format of the numbers sent" });
  for (const name of Object.keys(FORMATS)) format.append(part("option", { value: name }, name));
  const buttons = part("div", { class: "gi-buttons" });

  function show() {
    const sigma = sigmas[noisy.value];
    const bias = Number(sure.value);
    const g = sent(gradient(weight, bias, x, 1), noise, sigma, format.value);
    const found = recovered(g);
    const error = found ? relativeError(found, x) : NaN;
    sureValue.textContent = `b = ${bias}`;
    noisyValue.textContent = `σ = ${sigma}`;
    sure.setAttribute("aria-valuetext", sureValue.textContent);
    noisy.setAttribute("aria-valuetext", noisyValue.textContent);
    paint(pad, x, side);
    paint(message, stretched(g.weight), side);
    const off = (found ?? x).map((value, i) => value - x[i]);
    const factor = enlargement(off);
    paint(answer, found ?? x.map(() => 0.5), side);
    paint(difference, off.map((d) => 0.5 + (factor * d) / 2), side);
    gain.textContent = factor > 1 ? `difference × ${factor.toExponential(0).replace("+", "")}` : "difference";
    describe(g, found, error);
  }
  function describe(g, found, error) {
    const empty = !x.some((value) => value > 0);
    const size = error === 0 ? "0" : error.toExponential(1);
    const verdict = empty ? "draw something" : found ? `relative error: ${size}` : "the bias gradient is zero: nothing to divide by";
    status.textContent = `∂L/∂b = ${g.bias === 0 ? 0 : g.bias.toExponential(2)}  ·  ${verdict}`;
    status.dataset.error = empty || !found ? "" : String(error);
    message.setAttribute("aria-label", "The weight gradient, drawn as a picture: the drawing as a negative");
    answer.setAttribute("aria-label", `The recovered drawing; ${verdict}`);
    difference.setAttribute("aria-label", `Recovered minus drawn; ${verdict}`);
  }
  function keep() {
    model.set("picture", x);
    model.save_changes();
    show();
  }
  function dab(column, row, ink) {
    for (const [right, down, share] of [[0, 0, 1], [1, 0, 0.7], [0, 1, 0.7], [1, 1, 0.5], [-1, 0, 0.4], [0, -1, 0.4]]) {
      const [c, r] = [column + right, row + down];
      if (c < 0 || r < 0 || c >= side || r >= side) continue;
      const i = r * side + c;
      x[i] = ink ? Math.max(x[i], share) : 0;
    }
    show();
  }
  function place(event) {
    const box = pad.getBoundingClientRect();
    return [
      Math.floor(((event.clientX - box.left) / box.width) * side),
      Math.floor(((event.clientY - box.top) / box.height) * side),
    ];
  }
  function line([fromColumn, fromRow], [column, row]) {
    const steps = Math.max(1, Math.abs(column - fromColumn), Math.abs(row - fromRow));
    for (let i = 0; i <= steps; i++) {
      const share = i / steps;
      dab(Math.round(fromColumn + share * (column - fromColumn)), Math.round(fromRow + share * (row - fromRow)), true);
    }
  }
  function take(values) {
    x = [...values];
    keep();
  }
  async function drop(file) {
    if (!file) return;
    try {
      take(await readPicture(file, side));
    } catch {
      status.textContent = "That file is not a picture this browser can read.";
    }
  }

  pad.addEventListener("pointerdown", (event) => {
    pad.setPointerCapture(event.pointerId);
    cursor = place(event);
    dab(...cursor, true);
  });
  pad.addEventListener("pointermove", (event) => {
    if (!event.buttons) return;
    line(cursor, place(event));
    cursor = place(event);
  });
  pad.addEventListener("pointerup", keep);
  const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  pad.addEventListener("keydown", (event) => {
    const inks = { " ": true, Backspace: false, Delete: false };
    if (!(event.key in moves) && !(event.key in inks)) return;
    event.preventDefault();
    event.stopPropagation();
    if (event.key in inks) {
      dab(...cursor, inks[event.key]);
      keep();
    } else {
      cursor = cursor.map((at, i) => Math.min(side - 1, Math.max(0, at + moves[event.key][i])));
      show();
    }
    const context = pad.getContext("2d");
    context.fillStyle = "#f0a074";
    context.fillRect(...cursor, 1, 1);
  });
  pad.addEventListener("blur", show);
  for (const control of [sure, noisy, format]) control.addEventListener("input", show);
  el.addEventListener("dragover", (event) => event.preventDefault());
  el.addEventListener("drop", (event) => {
    event.preventDefault();
    drop(event.dataTransfer.files[0]);
  });

  function button(name, action) {
    const made = part("button", { type: "button" }, name);
    made.addEventListener("click", action);
    buttons.append(made);
  }
  button("Clear", () => take(x.map(() => 0)));
  for (const [name, values] of Object.entries(examples)) button(name, () => take(values));
  const file = part("input", { type: "file", accept: "image/*", "aria-label": "A picture of yours" });
  file.addEventListener("change", () => drop(file.files[0]));
  buttons.append(part("label", { class: "gi-file" }, "A picture of yours ", file));

  const row = (name, control, value) => part("div", { class: "gi-row" }, part("span", { class: "gi-label" }, name), control, value);
  el.append(part("figure", { class: "gi-widget gi-pad" },
    buttons,
    part("div", { class: "gi-panels" },
      panel(pad, part("p", {}, "draw here")),
      panel(message, part("p", {}, "sent for the weights")),
      panel(answer, part("p", {}, "recovered")),
      panel(difference, gain)),
    status,
    row("Bias b: how sure the neuron is", sure, sureValue),
    row("Noise σ", noisy, noisyValue),
    row("Numbers sent as", format, "")));
  show();
}

export default { render };
