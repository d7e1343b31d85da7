// Elements. What comes from a run becomes a text node or an attribute, never markup.

/** Return an element: `tag.class.class`, its attributes (`onclick` and the like are listeners), its children. */
function el(tag, attributes = {}, ...children) {
  const [name, ...classes] = tag.split(".");
  return furnish(document.createElement(name), classes, attributes, children);
}

/** The same of an SVG element. */
function svg(tag, attributes = {}, ...children) {
  const [name, ...classes] = tag.split(".");
  return furnish(document.createElementNS("http://www.w3.org/2000/svg", name), classes, attributes, children);
}

function furnish(node, classes, attributes, children) {
  if (classes.length) node.setAttribute("class", classes.join(" "));
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value === true) node.setAttribute(key, "");
    else if (value !== false && value != null) node.setAttribute(key, value);
  }
  node.append(...children.flat().filter((child) => child != null && child !== false));
  return node;
}

/** Put children in the place of all that an element holds. */
function fill(node, ...children) {
  node.replaceChildren(...children.flat().filter((child) => child != null && child !== false));
  return node;
}

/** Draw a part anew where it differs; what was unfolded in it stays so, and what did not change is left alone. */
function repaint(host, paint) {
  const fresh = host.cloneNode(false), unfolded = [...host.querySelectorAll("details[open] > summary")].map((one) => one.textContent);
  try {
    paint(fresh);
  } catch (error) { // a damaged file of the run: the other parts are still shown
    fill(fresh, el("p.muted", {}, `This part cannot be drawn: ${error.message}`));
  }
  for (const summary of fresh.querySelectorAll("details > summary")) summary.parentElement.open ||= unfolded.includes(summary.textContent);
  if (!fresh.isEqualNode(host)) host.replaceChildren(...fresh.childNodes);
}

const byId = (id) => document.getElementById(id);

/** Return a table; each cell carries its column's name, which a narrow screen shows before it. */
function table(head, rows, classes = "") {
  const cells = (row) =>
    row.map((cell, i) => el(i ? "td" : "th", { "data-of": head[i] || false, scope: i ? false : "row" }, cell));
  return el(
    `table${classes}`, {},
    el("thead", {}, el("tr", {}, head.map((name) => el("th", { scope: "col" }, name)))),
    el("tbody", {}, rows.map((row) => el("tr", {}, cells(row)))),
  );
}

let controls = 0;

/** Return a form control below its label. */
function labelled(text, control, classes = "") {
  control.id ||= `control-${++controls}`;
  return el(`div.control${classes}`, {}, el("label", { for: control.id }, text), control);
}

function select(options, attributes = {}) {
  return el("select", attributes, options.map(([value, text, chosen]) => el("option", { value, selected: chosen }, text)));
}

/** Call a function once the calls have paused for so many milliseconds. */
function paused(call, milliseconds) {
  let timer = 0;
  return () => {
    clearTimeout(timer);
    timer = setTimeout(call, milliseconds);
  };
}
