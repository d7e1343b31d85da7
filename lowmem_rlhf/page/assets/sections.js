// The parts of one run's page that stand still: overview, evaluation, plan, recipe, environment.

const STATES = { running: "running", finished: "finished", stopped: "stopped", gone: "gone" };

const partOf = (evaluation, name) => (evaluation?.[name] && typeof evaluation[name] === "object" ? evaluation[name] : {});
const duringOf = (evaluation) => (Array.isArray(evaluation?.during) ? evaluation.during.filter((row) => row && row.step > 0) : []);
const COUNTS = ["problems", "samples", "temperature", "step"];

/** Return the name of the measure that is shown first. */
const headlineOf = (run) => run.headline?.measure ?? "accuracy";

/** Return the measures of an evaluation's row by name, those of its tasks behind `TASK: `. */
function measuresOf(row) {
  const found = new Map();
  const take = (own, head) => {
    for (const [name, value] of Object.entries(own)) {
      if (!COUNTS.includes(name) && isNumber(value)) found.set(head + name, { value, bounds: boundsOf(own.intervals?.[name]) });
    }
  };
  take(row, "");
  for (const [task, own] of Object.entries(row.tasks ?? {})) take(own ?? {}, `${task}: `);
  return found;
}

const boundsOf = (bounds) => (Array.isArray(bounds) && bounds.length === 2 && bounds.every(isNumber) ? bounds : null);

function card(label, value, note = "") {
  return el("div.card", {}, el("span.muted", {}, label), el("b", {}, value), note && el("span.muted.small", {}, note));
}

function drawOverview(host, run, columns) {
  const name = headlineOf(run), ends = ["before", "after"].map((when) => measuresOf(partOf(run.evaluation, when)).get(name));
  const latest = ends[1] ?? measuresOf(duringOf(run.evaluation).at(-1) ?? {}).get(name);
  const cards = [card("state", STATES[run.state] ?? String(run.state ?? "unknown"), run.max_steps ? `step ${formatNumber(run.step)} of ${formatNumber(run.max_steps)}` : `step ${formatNumber(run.step)}`)];
  if (ends[0] || latest) {
    const bounds = (one) => (one?.bounds ? `[${one.bounds.map((b) => formatMeasure(name, b)).join(", ")}]` : "?");
    const note = ends[0]?.bounds || latest?.bounds ? `${bounds(ends[0])} → ${latest ? bounds(latest) : "not yet"}` : "";
    const to = latest ? formatMeasure(name, latest.value) : "not yet";
    cards.push(card(`held-out ${inWords(name)}`, `${ends[0] ? formatMeasure(name, ends[0].value) : "?"} → ${to}`, note && `95% intervals ${note}`));
  }
  const last = (metric) => columns.get(metric)?.findLast(isNumber);
  const known = [["reward/mean", "last training reward"], ["loss", "last training loss"]].find(([metric]) => isNumber(last(metric)));
  if (known) cards.push(card(known[1], formatNumber(last(known[0]))));
  const times = (columns.get("time/step") ?? []).filter(isNumber), mean = times.reduce((a, b) => a + b, 0) / times.length;
  if (times.length) {
    const left = run.state === "running" && run.max_steps > run.step ? `about ${formatSeconds((run.max_steps - run.step) * mean)} of training left` : `${formatSeconds(mean)} a step`;
    cards.push(card("training time", formatSeconds(mean * (run.step || times.length)), left));
  }
  const peaks = (columns.get("memory/peak_bytes") ?? []).filter(isNumber);
  if (peaks.length) cards.push(card("peak memory", formatBytes(Math.max(...peaks)), run.plan?.memory?.peak_bytes ? `planned ${formatBytes(run.plan.memory.peak_bytes)}` : ""));
  fill(host, cards);
}

/** Draw the held-out table, each measure with its intervals as a picture where it has any. */
function drawEvaluation(host, run) {
  const { evaluation } = run, best = partOf(evaluation, "best").step;
  const columns = [["before", partOf(evaluation, "before")], ["after", partOf(evaluation, "after")]];
  const found = duringOf(evaluation).find((row) => row.step === best);
  if (found && best !== columns[1][1].step) columns.splice(1, 0, [`best, step ${best}`, found]);
  const measures = columns.map(([, row]) => measuresOf(row)), first = headlineOf(run);
  const names = [...new Set(measures.flatMap((one) => [...one.keys()]))];
  const place = (name) => (name === first ? 0 : name === "accuracy" ? 1 : name.startsWith("reward/") ? 2 : name.includes(": ") ? 4 : 3);
  names.sort((a, b) => place(a) - place(b));
  if (!names.length) fill(host, el("p.muted", {}, "Nothing has been evaluated on held-out data yet."));
  else {
    const rows = names.map((name) => [name, ...measures.map((one) => (one.has(name) ? withInterval(name, one.get(name).value, one.get(name).bounds) : MISSING)), intervalPicture(name, measures)]);
    fill(host, table(["held-out", ...columns.map(([name]) => name), "95% intervals"], rows, ".stack.numbers"), aboutEvaluation(run));
  }
  host.append(...(run.later ?? []).toReversed().slice(0, 3).map(laterTable));
}

function aboutEvaluation(run) {
  const { evaluation } = run;
  const row = [partOf(evaluation, "after"), partOf(evaluation, "before")].find((one) => isNumber(one.problems)), notes = [];
  if (row) notes.push(counted(row.problems, "held-out problem"));
  if (isNumber(row?.samples)) notes.push(`${counted(row.samples, "answer")} each at temperature ${formatNumber(row.temperature)}`);
  if (row?.intervals) notes.push("95% intervals over them in brackets");
  const sentences = [notes.join(", "), evaluation?.stopped].filter(Boolean);
  const list = duringOf(evaluation).map((one) => {
    const name = headlineOf(run), measure = measuresOf(one).get(name);
    return [`step ${one.step}`, measure ? withInterval(name, measure.value, measure.bounds) : MISSING];
  });
  return [
    ...sentences.map((sentence) => el("p.muted", {}, String(sentence))),
    list.length > 0 && el("details", {}, el("summary", {}, counted(list.length, "evaluation") + " while it trained"), table(["after", inWords(headlineOf(run))], list, ".numbers")),
  ];
}

/** Draw each column's interval as a line with a dot, one below the other, on the scale that they span. */
function intervalPicture(name, measures) {
  const known = measures.map((one) => one.get(name)), bounds = known.flatMap((one) => one?.bounds ?? []);
  if (!bounds.length) return "";
  const share = isShare(name), low = share ? 0 : Math.min(...bounds), high = share ? 1 : Math.max(...bounds);
  const at = (value) => 8 + (184 * (value - low)) / (high - low || 1), height = 10 * known.length + 4;
  const lines = known.flatMap((one, i) => one?.bounds ? [
    svg(`line.interval-${i && i === known.length - 1 ? "after" : i ? "best" : "before"}`, { x1: at(one.bounds[0]), x2: at(one.bounds[1]), y1: 7 + 10 * i, y2: 7 + 10 * i }),
    svg(`circle.interval-${i && i === known.length - 1 ? "after" : i ? "best" : "before"}`, { cx: at(one.value), cy: 7 + 10 * i, r: 3.5 }),
  ] : []);
  return svg("svg.intervals", { viewBox: `0 0 200 ${height}`, role: "img", "aria-label": `intervals of ${name}` },
    svg("line.base", { x1: 8, x2: 192, y1: height - 1, y2: height - 1 }), lines);
}

/** Return the table of one outcome of `lowmem-rlhf eval`. */
function laterTable(outcome) {
  const results = outcome.results ?? {}, targets = Object.keys(results), rows = [];
  const cell = (name, one) => (one && isNumber(one.value) ? withInterval(name, one.value, boundsOf([one.low, one.high])) : MISSING);
  const take = (own, difference, head) => {
    for (const name of new Set(Object.values(own).flatMap((one) => Object.keys(one ?? {})))) {
      rows.push([head + name, ...targets.map((target) => cell(name, own[target]?.[name])), ...(outcome.difference ? [cell(name, difference?.[name])] : [])]);
    }
  };
  take(results, outcome.difference, "");
  rows.sort((a, b) => (b[0] === outcome.headline) - (a[0] === outcome.headline));
  if (outcome.tasks && typeof outcome.tasks === "object" && !Array.isArray(outcome.tasks)) {
    for (const [task, own] of Object.entries(outcome.tasks)) take(own?.results ?? {}, own?.difference, `${task}: `);
  }
  const about = Object.entries(outcome.counts ?? {}).map(([noun, count]) => counted(count, `held-out ${noun}`));
  if (outcome.samples) about.push(`${counted(outcome.samples, "answer")} each at temperature ${formatNumber(outcome.temperature)}`);
  if (isNumber(outcome.steps)) about.push(`policy after ${counted(outcome.steps, "step")}`);
  about.push(`data ${textOf(outcome.data ?? "?")}`);
  return el("div.later", {}, el("h3", {}, `Evaluated later${outcome.made ? `: ${outcome.made}` : ""}`),
    table(["held-out", ...targets, ...(outcome.difference ? ["difference"] : [])], rows, ".stack.numbers"),
    el("p.muted", {}, about.join(", ")), outcome.method && el("p.muted", {}, String(outcome.method)));
}

function drawPlan(host, run) {
  const plan = run.plan ?? {}, device = plan.device ?? {}, settings = Object.entries(plan.settings ?? {});
  if (!settings.length) {
    fill(host, el("p.muted", {}, "No plan was saved."));
    return;
  }
  const about = `${device.name ?? "unknown device"}, ${formatBytes(device.free_bytes)} free of ${formatBytes(device.total_bytes)}, profile ${plan.profile ?? "none"}`;
  const rows = settings.map(([name, value]) => [name, formatValue(value), textOf(plan.reasons?.[name])]);
  fill(host, el("p", {}, about), table(["setting", "value", "why"], rows, ".stack"));
}

function drawEnvironment(host, run) {
  const rows = (run.environment ?? []).map(([name, value]) => [name, textOf(value)]);
  fill(host, rows.length ? table(["", ""], rows, ".facts") : el("p.muted", {}, "Nothing was recorded."));
}
