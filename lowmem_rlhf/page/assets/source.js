// Where a run's data comes from: a report has it in the page, `watch` asks its server. Both answer in the same words.

// Of equals the newest comes first; what has no number comes last.
const SORTS = {
  newest: (a, b) => b.index - a.index,
  oldest: (a, b) => a.index - b.index,
  highest: (a, b, name) => inOrder(rewardOf(b, name), rewardOf(a, name), true) || b.index - a.index,
  lowest: (a, b, name) => inOrder(rewardOf(a, name), rewardOf(b, name), false) || b.index - a.index,
  longest: (a, b) => lengthOf(b) - lengthOf(a) || b.index - a.index,
  shortest: (a, b) => lengthOf(a) - lengthOf(b) || b.index - a.index,
};

const lengthOf = (row) => row.tokens ?? textOf(row.completion).length;

function inOrder(first, second, turned) {
  if (isNumber(first) && isNumber(second)) return first - second;
  return (isNumber(second) - isNumber(first)) * (turned ? -1 : 1);
}

const rewardOf = (row, name) => (name ? (row.rewards ?? {})[name] : row.reward);

/** The data of a report. */
class Embedded {
  constructor(data) {
    this.data = data;
    this.live = false;
  }

  async runs() { return [{ id: "report", ...this.data.run }]; }
  async run() { return this.data.run; }
  async columns() { return this.data.columns; }

  async samples(id, query) {
    const matches = this.data.samples.rows.filter((row) => isMatch(row, query));
    matches.sort((a, b) => SORTS[query.sort](a, b, query.reward));
    const rows = matches.slice(query.offset, query.offset + query.limit);
    return { total: matches.length, all: this.data.samples.rows.length, left_out: this.data.samples.left_out, rows };
  }

  async samePrompt(id, index) {
    const rows = this.data.samples.rows, prompt = JSON.stringify(rows.find((row) => row.index === index)?.prompt);
    const found = rows.filter((row) => JSON.stringify(row.prompt) === prompt).sort(SORTS.oldest);
    return { total: found.length, rows: found };
  }
}

function isMatch(row, { text, task, reward, low, high, first, last, truncated }) {
  const value = rewardOf(row, reward), words = text?.toLowerCase();
  if (words && !`${textOf(row.prompt)}\n${textOf(row.completion)}`.toLowerCase().includes(words)) return false;
  if (task && row.task !== task) return false;
  if (low !== undefined && !(isNumber(value) && value >= low)) return false;
  if (high !== undefined && !(isNumber(value) && value <= high)) return false;
  if (first !== undefined && !(row.step >= first)) return false;
  if (last !== undefined && !(row.step <= last)) return false;
  return truncated === undefined || row.truncated === truncated;
}

/** The data of `watch`: its server on this machine. */
class Fetched {
  constructor(token) {
    this.token = token;
    this.live = true;
  }

  async ask(path, query = {}, body = undefined) {
    const given = Object.entries(query).filter(([, value]) => value !== undefined && value !== "");
    const tail = given.length ? `?${new URLSearchParams(given)}` : "";
    const headers = { "X-Token": this.token, ...(body ? { "Content-Type": "application/json" } : {}) };
    let answer;
    try {
      answer = await fetch(`/api/${path}${tail}`, { headers, method: body ? "POST" : "GET", body: body && JSON.stringify(body) });
    } catch {
      throw new Error("The server of this page does not answer; start lowmem-rlhf watch again.");
    }
    const found = await answer.json().catch(() => ({}));
    if (!answer.ok || found.error) throw new Error(found.error || `The server answered ${answer.status}.`);
    return found;
  }

  async runs() {
    const found = await this.ask("runs");
    return Array.isArray(found) ? found : found.runs;
  }

  run(id) { return this.ask(`run/${encodeURIComponent(id)}`); }
  columns(id, since) { return this.ask(`run/${encodeURIComponent(id)}/columns`, { since, points: 1000 }); }
  samples(id, query) { return this.ask(`run/${encodeURIComponent(id)}/samples`, query); }
  samePrompt(id, index) { return this.ask(`run/${encodeURIComponent(id)}/same_prompt`, { index }); }
  gpu() { return this.ask("gpu"); }
  chat(id, prompt, task) { return this.ask(`run/${encodeURIComponent(id)}/chat`, {}, { prompt, task }); }
}

/** The columns of one run, which grow while it trains. */
class Columns {
  constructor() {
    this.last = 0;
    this.step = [];
    this.columns = Object.create(null);
    this.low = Object.create(null);
    this.high = Object.create(null);
    this.heldOut = null;
    this.withRates = null;
    this.takenBack = undefined;
  }

  /** Take over what the source told of the steps after `last`; return whether there was any, `"anew"` where all changed. */
  add(told) {
    if (told.taken_back !== this.takenBack) {
      const began = this.takenBack;
      Object.assign(this, new Columns(), { takenBack: told.taken_back });
      if (began !== undefined) return "anew"; // a resume from an earlier checkpoint: all is to be asked for again
    }
    if (!told.step.length) return false;
    const old = this.step.length;
    this.step = this.step.concat(told.step);
    for (const part of ["columns", "low", "high"]) this[part] = joined(this[part], told[part] ?? {}, old, told.step.length);
    this.last = told.last;
    this.withRates = withRates(this.columns);
    return true;
  }

  /** Take over what the held-out evaluations measured, where they are at least three: a curve over their steps. */
  setHeldOut(evaluation) {
    this.heldOut = new Map();
    const after = partOf(evaluation, "after"), rows = [[0, partOf(evaluation, "before")], ...duringOf(evaluation).map((row) => [row.step, row])];
    const end = isNumber(after.step) ? after.step : this.last;
    if (Object.keys(after).length) rows.splice(0, rows.length, ...rows.filter(([step]) => step !== end), [end, after]);
    for (const [step, row] of rows) for (const [name, { value, bounds }] of measuresOf(row)) {
      const key = `${HELD_OUT}${name}`;
      if (!this.heldOut.has(key)) this.heldOut.set(key, { step: [], values: [], low: [], high: [] });
      const curve = this.heldOut.get(key);
      for (const [part, one] of [["step", step], ["values", value], ["low", bounds?.[0] ?? null], ["high", bounds?.[1] ?? null]]) curve[part].push(one);
    }
    for (const [key, curve] of this.heldOut) if (curve.step.length < 3) this.heldOut.delete(key);
  }

  get(name) { return this.curve(name).values; }

  /** Return the curve of a metric: its `step`, its `values`, and where there are any the `low` and `high` of each. */
  curve(name) {
    return this.heldOut?.get(name) ?? { step: this.step, values: (this.withRates ?? this.columns)[name], low: this.low[name], high: this.high[name] };
  }

  /** Return the metrics that have a number. */
  names() {
    const logged = Object.entries(this.withRates ?? {}).filter(([, values]) => values.some(isNumber)).map(([name]) => name);
    return [...logged, ...(this.heldOut?.keys() ?? [])];
  }
}

function joined(before, more, old, count) {
  const found = Object.create(null); // a metric may have any name
  for (const name of new Set([...Object.keys(before), ...Object.keys(more)])) {
    found[name] = (before[name] ?? Array(old).fill(null)).concat(more[name] ?? Array(count).fill(null));
  }
  return found;
}
