// Memory and time by phase, against the plan. Bars are SVG, so that their lengths are attributes and not styles.

const PARTS = 6; // components told apart; the others are the rest
const PHASES = { rollout: "rollout", score: "score", scoring: "score", update: "update" };

/** Return a bar of `pieces` [length, class, title] on a scale, with marks [position, class, title]. */
function bar(pieces, marks, scale, label) {
  let x = 0;
  const rects = pieces.map(([length, kind, title]) => {
    const rect = svg(`rect.${kind}`, { x: (1000 * x) / scale, y: 4, width: Math.max(0, (1000 * length) / scale), height: 16 }, svg("title", {}, title));
    x += length;
    return rect;
  });
  const lines = marks.map(([at, kind, title]) =>
    svg(`line.mark.${kind}`, { x1: (1000 * at) / scale, x2: (1000 * at) / scale, y1: 0, y2: 24 }, svg("title", {}, title)));
  return svg("svg.bar", { viewBox: "0 0 1000 24", preserveAspectRatio: "none", role: "img", "aria-label": label }, rects, lines);
}

/** A row of bars: what it is of, how much, the bar. */
function barRow(name, amount, picture) {
  return el("div.bar-row", {}, el("span.bar-name", {}, name), el("span.bar-amount", {}, amount), picture);
}

function legendOf(entries) {
  return el("ul.legend.plain", {}, entries.map(([kind, text]) =>
    el("li", {}, svg("svg.box", { viewBox: "0 0 12 12", "aria-hidden": "true" }, kind.startsWith("mark ")
      ? svg(`line.${kind.replace(" ", ".")}`, { x1: 6, x2: 6, y1: 0, y2: 12 })
      : svg(`rect.${kind}`, { width: 12, height: 12 })), el("span", {}, text))));
}

/** Draw what each phase was planned to take, component by component, and the peak that was measured. */
function drawMemory(host, run, columns) {
  const memory = run.plan?.memory ?? {}, measured = Math.max(-1, ...(columns.get("memory/peak_bytes") ?? []).filter(isNumber));
  const phases = Object.entries(memory.phases ?? {}).filter(([, parts]) => parts && typeof parts === "object");
  if (!phases.length) {
    fill(host, el("p.muted", {}, measured < 0 ? "No memory was planned or measured." : `No memory was planned; the measured peak is ${formatBytes(measured)}.`));
    return;
  }
  const size = (parts) => Object.values(parts).filter(isNumber).reduce((a, b) => a + b, 0);
  const sizes = new Map();
  for (const [, parts] of phases) for (const [name, bytes] of Object.entries(parts)) {
    if (bytes > 0) sizes.set(name, Math.max(bytes, sizes.get(name) ?? 0));
  }
  const all = [...sizes.keys()].sort((a, b) => sizes.get(b) - sizes.get(a));
  const large = all.slice(0, PARTS), rest = all.slice(PARTS), words = (name) => name.replaceAll("_", " ");
  const top = Math.max(measured, ...phases.map(([, parts]) => size(parts)), 1), budget = memory.budget_bytes;
  const inSight = isNumber(budget) && budget < 2 * top, scale = 1.03 * Math.max(top, inSight ? budget : 0);
  const marks = [
    ...(measured >= 0 ? [[measured, "measured", `measured peak: ${formatBytes(measured)}`]] : []),
    ...(inSight ? [[budget, "budget", `budget: ${formatBytes(budget)}`]] : []),
  ];
  const rows = phases.map(([phase, parts]) => {
    const pieces = large.map((name, i) => [parts[name] || 0, `part-${i}`, `${words(name)}: ${formatBytes(parts[name] || 0)}`]);
    const others = rest.reduce((sum, name) => sum + (parts[name] || 0), 0);
    pieces.push([others, "part-rest", `the rest: ${formatBytes(others)}`]);
    return barRow(phase, formatBytes(size(parts)), bar(pieces, marks, scale, `${phase}: ${formatBytes(size(parts))} planned`));
  });
  const about = [`planned peak ${formatBytes(memory.peak_bytes)} of a budget of ${formatBytes(budget)}`];
  if (measured >= 0) about.push(`measured peak ${formatBytes(measured)}`);
  const keys = [...large.map((name, i) => [`part-${i}`, words(name)]), ...(rest.length ? [["part-rest", "the rest"]] : [])];
  if (measured >= 0) keys.push(["mark measured", "measured peak"]);
  if (inSight) keys.push(["mark budget", "budget"]);
  const cells = all.map((name) => [words(name), ...phases.map(([, parts]) => (parts[name] ? formatBytes(parts[name]) : MISSING))]);
  fill(host, el("p", {}, `${about.join("; ")}.`), el("div.bars", {}, rows), legendOf(keys),
    el("details", {}, el("summary", {}, "Every component in numbers"), el("div.wide", {}, table(["component", ...phases.map(([phase]) => phase)], cells, ".stack.numbers"))));
}

/** Draw the mean time of each phase over the steps, beside what was planned. */
function drawTime(host, run, columns) {
  const plan = run.plan?.time ?? {}, planned = new Map(Object.entries(plan.phases ?? {}).filter(([, s]) => isNumber(s)));
  const mean = (name) => {
    const values = (columns.get(`time/${name}`) ?? []).filter(isNumber);
    return values.length ? values.reduce((a, b) => a + b, 0) / values.length : null;
  };
  const measured = columns.names().filter((name) => name.startsWith("time/") && name !== "time/step").map((name) => name.slice(5));
  const phases = [...new Set([...planned.keys(), ...measured])];
  if (!phases.length && mean("step") === null) {
    fill(host, el("p.muted", {}, "No time was planned or measured."));
    return;
  }
  const rows = [...phases.map((name) => [name, planned.get(name), mean(name)]), ["whole step", plan.step_seconds, mean("step")]];
  const scale = 1.03 * Math.max(1e-9, ...rows.flatMap(([, a, b]) => [a ?? 0, b ?? 0]));
  const line = (name, seconds, kind) => isNumber(seconds) &&
    barRow("", formatSeconds(seconds), bar([[seconds, kind, `${name}, ${kind}: ${formatSeconds(seconds)}`]], [], scale, `${name}, ${kind}: ${formatSeconds(seconds)}`));
  const shown = rows.map(([name, a, b]) => el("div.pair", {}, el("span.bar-name", {}, name), el("div", {}, line(name, a, "planned"), line(name, b, "taken"))));
  const facts = [];
  if (isNumber(plan.run_seconds)) facts.push(`planned for the run: ${formatSeconds(plan.run_seconds)}, with ${counted(plan.evaluations ?? 0, "evaluation")}`);
  if (isNumber(plan.measured?.ratio)) facts.push(`measured steps took ${formatNumber(plan.measured.ratio)} times what they were predicted to take`);
  const keys = [...(planned.size ? [["planned", "planned"]] : []), ["taken", "measured, mean of a step"]];
  fill(host, facts.length > 0 && el("p", {}, `${facts.join("; ")}.`), el("div.bars", {}, shown), legendOf(keys));
}
