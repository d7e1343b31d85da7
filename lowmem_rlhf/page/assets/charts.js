// Panels of curves, drawn by uPlot: one unit and one axis a panel; lines differ in colour and in dash.

const DASHES = [[], [9, 4], [2, 3], [12, 4, 2, 4], [5, 3], [16, 5], [9, 3, 2, 3, 2, 3], [1, 2]];
const COLORS = 8;
const HEIGHT = 210;
const NARROW = matchMedia("(max-width: 640px)");

const styleOf = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/** Return the running mean of a curve that forgets by `weight` a step, as TensorBoard's: 0 changes nothing. */
function smoothed(values, weight) {
  if (!weight) return values;
  let sum = 0, scale = 0;
  return values.map((value) => {
    if (!isNumber(value)) return null;
    sum = weight * sum + (1 - weight) * value;
    scale = weight * scale + (1 - weight);
    return sum / scale;
  });
}

/** Return between which values rewards can lie, as far as all that was seen of them tells. */
function rewardRange(columns) {
  const seen = (values) => (values ?? []).filter(isNumber);
  const totals = seen(columns.get("reward/mean"));
  const each = columns.names().filter((name) => EACH_REWARD.test(name));
  const parts = each.flatMap((name) => seen(columns.get(name)));
  const within = (values, low, high) => values.every((value) => value >= low && value <= high);
  return [within([...totals, ...parts], 0, Infinity) ? 0 : -Infinity,
    within(parts, 0, 1) && within(totals, 0, Math.max(1, each.length)) ? Math.max(1, each.length) : Infinity];
}

/** All panels of a page, which share zoom, smoothing and scale. */
class Charts {
  constructor(host, status) {
    this.host = host;
    this.status = status;
    this.runs = []; // {name, columns}
    this.weight = 0;
    this.log = false;
    this.zoom = null;
    this.hidden = new Set();
    this.panels = [];
    this.key = "";
    let width = 0;
    new ResizeObserver(() => {
      if (Math.round(host.clientWidth) === width) return;
      width = Math.round(host.clientWidth);
      this.panels.forEach((panel) => panel.resize());
    }).observe(host);
  }

  /** Draw the runs; the panels stay as they are where no metric came or went. */
  show(runs) {
    this.runs = runs;
    const specs = panelsOf([...new Set(runs.flatMap((run) => run.columns.names()))]);
    const key = JSON.stringify([specs.map((spec) => [spec.title, spec.series]), runs.map((run) => run.name)]);
    if (key !== this.key) this.build(specs);
    else this.redraw();
    this.key = key;
  }

  build(specs) {
    this.panels.forEach((panel) => panel.destroy());
    this.panels = [];
    const groups = GROUPS.filter((group) => specs.some((spec) => spec.group === group)).map((group, place) => {
      const own = specs.filter((spec) => spec.group === group).map((spec) => new Panel(this, spec));
      this.panels.push(...own);
      const panels = el("div.panels", {}, own.map((panel) => panel.node));
      return el("details.group", { open: place < 2 || !NARROW.matches, ontoggle: () => own.forEach((panel) => panel.resize()) },
        el("summary", {}, el("h3", {}, group), el("span.muted", {}, counted(own.length, "panel"))), panels);
    });
    fill(this.host, groups.length ? groups : el("p.muted", {}, "No step has been recorded yet."));
    this.redraw();
  }

  redraw() { this.panels.forEach((panel) => panel.draw()); }

  zoomTo(range) {
    this.zoom = range;
    this.redraw();
    this.status(range ? `Steps ${formatNumber(Math.ceil(range[0]))} to ${formatNumber(Math.floor(range[1]))}` : "All steps");
  }
}

/** One panel: a heading, its curves, and a legend of buttons that hide a curve and tell its value at the cursor. */
class Panel {
  constructor(charts, spec) {
    this.charts = charts;
    this.spec = spec;
    this.plot = null;
    this.frame = el("div.plot", { tabindex: 0, role: "img", onkeydown: (event) => this.onKey(event) });
    this.legend = el("ul.legend");
    this.note = el("p.muted.note", { hidden: true });
    this.node = el("figure.panel", {}, el("figcaption", {}, spec.title), this.frame, this.note, this.legend);
  }

  destroy() { this.plot?.destroy(); }

  resize() {
    const width = this.frame.clientWidth;
    if (this.plot && width && width !== this.plot.width) this.plot.setSize({ width, height: HEIGHT });
    else if (width) this.draw();
  }

  /** Return the curves: of each run each metric, with colour and dash (both differ from any other's in the panel). */
  curves() {
    const { runs } = this.charts, several = runs.length > 1;
    return this.spec.series.flatMap(([metric, label], m) =>
      runs.map((run, r) => ({
        run, metric, ...run.columns.curve(metric),
        label: several ? (this.spec.series.length > 1 ? `${run.name}: ${label}` : run.name) : label,
        color: styleOf(`--series-${(several ? r : m) % COLORS}`),
        swatch: `series-${(several ? r : m) % COLORS}`,
        dash: DASHES[(several ? m * runs.length + r : m) % DASHES.length],
        key: `${this.spec.title}/${metric}/${run.name}`,
      })).filter((curve) => curve.values?.some(isNumber)));
  }

  /** Draw anew what changed: the numbers alone where the curves are the same, so that a cursor stays where it is. */
  draw() {
    if (!this.frame.clientWidth || !this.frame.checkVisibility()) return; // in a group that is folded
    const curves = this.curves(), log = this.charts.log && curves.some((c) => c.values.some((v) => v > 0));
    this.shown = curves.filter((curve) => !this.charts.hidden.has(curve.key));
    const { data, series, bands } = this.data(this.shown, log);
    this.steps = data[0];
    const key = JSON.stringify([curves.map((c) => [c.key, c.color]), series, log]);
    if (this.plot && key === this.key) this.plot.setData(data);
    else {
      this.plot?.destroy();
      this.plot = new uPlot(this.options(series, bands, log), data, this.frame);
      this.drawLegend(curves);
    }
    this.key = key;
    this.note.hidden = !(this.charts.log && !log);
    this.note.textContent = "No value above zero: drawn on a linear scale.";
    this.describe(curves);
    this.tell(this.plot.cursor.idx);
  }

  /** Return uPlot's aligned columns: the steps of all runs, then of each curve what is drawn of it. */
  data(curves, log) {
    const steps = [...new Set(curves.flatMap((curve) => curve.step))].sort((a, b) => a - b);
    const at = new Map(steps.map((step, i) => [step, i])), data = [steps], series = [{}], bands = [];
    const scale = this.spec.kind === "bytes" ? 2 ** -30 : this.spec.kind === "share" ? 100 : 1;
    const push = (curve, values, options) => {
      const column = Array(steps.length).fill(null);
      curve.step.forEach((step, i) => {
        const value = values[i];
        if (isNumber(value) && !(log && value <= 0)) column[at.get(step)] = value * scale;
      });
      data.push(column);
      series.push({ stroke: curve.color, spanGaps: true, ...options });
      return data.length - 1;
    };
    for (const curve of curves) {
      const weight = this.charts.weight, few = curve.values.filter(isNumber).length < 40;
      if (curves.length === 1) {
        const edges = this.edges(curve);
        if (edges) {
          const [low, high] = edges.map((edge) => push(curve, smoothed(edge, weight), { width: 0, points: { show: false }, edge: true }));
          bands.push({ series: [high, low], fill: `${curve.color}26` });
        }
      }
      if (weight) push(curve, curve.values, { width: 1, alpha: 0.3, points: { show: false } });
      curve.column = push(curve, smoothed(curve.values, weight), { width: 2, dash: curve.dash, points: { show: few, size: 4, fill: curve.color } });
    }
    return { data, series, bands };
  }

  /** Return the curves of a band: one standard deviation, inside the reward's range, or a bucket's least and greatest. */
  edges(curve) {
    const { columns } = curve.run, { low, high } = curve, spread = this.spec.spread && columns.get(this.spec.spread);
    if (spread) {
      const [least, greatest] = rewardRange(columns);
      const edge = (sign) => curve.values.map((mean, i) =>
        isNumber(mean) && isNumber(spread[i]) ? Math.min(greatest, Math.max(least, mean + sign * spread[i])) : null);
      return [edge(-1), edge(1)];
    }
    return low && high ? [low, high] : null;
  }

  options(series, bands, log) {
    const { spec } = this, ink = styleOf("--muted"), grid = { stroke: styleOf("--grid"), width: 1 };
    const axis = { stroke: ink, grid, ticks: { ...grid, size: 4 }, font: "12px system-ui, sans-serif" };
    return {
      width: this.frame.clientWidth, height: HEIGHT, series, bands, legend: { show: false }, padding: [8, 10, 0, 0],
      scales: {
        x: { time: false, range: () => this.reach() },
        y: log ? { distr: 3, log: 10 } : { range: (plot, low, high) => this.range(low, high) },
      },
      axes: [
        { ...axis, space: 60, size: 26, values: (plot, ticks) => ticks.map((tick) => (Number.isInteger(tick) ? formatTick(tick) : "")) },
        { ...axis, space: 36, size: (plot, labels) => 14 + 7 * Math.max(3, ...(labels ?? []).map((text) => text?.length ?? 0)),
          values: (plot, ticks) => ticks.map((tick) => (tick === null ? "" : formatTick(tick) + (spec.kind === "share" ? "%" : ""))) },
      ],
      cursor: {
        drag: { x: true, y: false, setScale: false }, y: false,
        points: { size: 7, show: (plot, i) => (plot.series[i].edge || plot.series[i].alpha < 1 ? null : cursorPoint(plot, i)) },
        sync: { key: "steps", scales: ["x", null], filters: { pub: (type) => type === "mousemove" || type === "mouseleave" } },
      },
      hooks: { setSelect: [(plot) => this.onSelect(plot)], setCursor: [(plot) => this.tell(plot.cursor.idx)] },
    };
  }

  /** Return the first and the last step that are in view. */
  reach() {
    const [from, to] = this.charts.zoom ?? [this.steps[0] ?? 0, this.steps.at(-1) ?? 1];
    return from < to ? [from, to] : [from - 1, to + 1];
  }

  range(low, high) {
    if (low === null || high === null || (low === 0 && high === 0)) return [0, this.spec.kind === "share" ? 100 : 1];
    const room = 0.06 * (high - low || Math.abs(high)), all = this.spec.kind === "share" ? 100 : Infinity;
    const bottom = low >= 0 && (this.spec.kind !== "level" || low < high / 2) ? 0 : low - room;
    return [bottom, Math.min(high + room, Math.max(all, high))];
  }

  onSelect(plot) {
    const { left, width } = plot.select;
    if (width < 6) return;
    const range = [plot.posToVal(left, "x"), plot.posToVal(left + width, "x")];
    plot.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
    queueMicrotask(() => this.charts.zoomTo(range));
  }

  onKey(event) {
    if (!this.plot) return;
    const { steps } = this, [from, to] = this.reach();
    const visible = steps.map((step, i) => i).filter((i) => steps[i] >= from && steps[i] <= to);
    const here = visible.indexOf(this.plot.cursor.idx ?? visible.at(-1)), jump = event.shiftKey ? 10 : 1;
    const target = { ArrowLeft: here - jump, ArrowRight: here + jump, Home: 0, End: visible.length - 1 }[event.key];
    if (target !== undefined && visible.length) {
      const index = visible[Math.min(visible.length - 1, Math.max(0, target))];
      this.plot.setCursor({ left: this.plot.valToPos(steps[index], "x"), top: 1 });
      this.charts.status(`${this.spec.title}, step ${steps[index]}: ${this.valuesAt(index).map(([c, v]) => `${c.label} ${v}`).join(", ")}`);
    } else if (event.key === "Escape" || event.key === "0") this.charts.zoomTo(null);
    else if (event.key === "+" || event.key === "-") this.zoomBy(event.key === "+" ? 0.5 : 2, steps, from, to);
    else return;
    event.preventDefault();
  }

  zoomBy(factor, steps, from, to) {
    const middle = steps[this.plot.cursor.idx] ?? (from + to) / 2, half = (factor * (to - from)) / 2;
    const range = [Math.max(steps[0], middle - half), Math.min(steps.at(-1), middle + half)];
    if (factor > 1 && range[0] <= steps[0] && range[1] >= steps.at(-1)) this.charts.zoomTo(null);
    else if (range[1] - range[0] >= 1) this.charts.zoomTo(range);
  }

  format(value) {
    if (!isNumber(value)) return MISSING;
    return this.spec.kind === "share" ? formatPercent(value / 100) : formatNumber(value);
  }

  valuesAt(index) {
    return this.shown.map((curve) => [curve, this.format(this.plot.data[curve.column]?.[index])]);
  }

  /** Write the values at the cursor, or the last ones, into the legend. */
  tell(index) {
    if (!this.plot || !this.outputs) return;
    const { data } = this.plot, at = isNumber(index) ? index : null;
    for (const curve of this.shown) {
      const value = at === null ? data[curve.column].findLast(isNumber) : data[curve.column][at];
      this.outputs.get(curve.key).textContent = this.format(value);
    }
    this.where.textContent = at === null ? "" : `step ${formatNumber(data[0][at])}`;
  }

  drawLegend(curves) {
    this.where = el("li.muted.where");
    this.outputs = new Map(curves.map((curve) => [curve.key, el("b", {}, "hidden")]));
    const items = curves.map((curve) => {
      const on = this.shown.includes(curve);
      const line = svg(`svg.swatch.${curve.swatch}`, { viewBox: "0 0 28 8", "aria-hidden": "true" },
        svg("line", { x1: 1, y1: 4, x2: 27, y2: 4, "stroke-dasharray": curve.dash.join(" ") || "none" }));
      const toggle = () => {
        this.charts.hidden[on ? "add" : "delete"](curve.key);
        this.draw();
        this.legend.querySelectorAll("button")[curves.indexOf(curve)]?.focus();
      };
      return el("li", {}, el("button.key", { type: "button", "aria-pressed": String(on), onclick: toggle }, line, el("span", {}, curve.label), this.outputs.get(curve.key)));
    });
    fill(this.legend, items, this.where);
  }

  /** Say in words what a picture shows. */
  describe(curves) {
    const parts = curves.map((curve) => {
      const known = curve.values.filter(isNumber), shown = (v) => (this.spec.kind === "bytes" ? formatBytes(v) : this.spec.kind === "share" ? formatPercent(v) : formatNumber(v));
      return `${curve.label} from ${shown(known[0])} to ${shown(known.at(-1))}`;
    });
    this.frame.setAttribute("aria-label", `${this.spec.title} over the steps: ${parts.join("; ")}. Left and right read values, plus and minus zoom.`);
  }
}

/** The dot of a curve at the cursor. */
function cursorPoint(plot, index) {
  const dot = document.createElement("div");
  dot.className = "u-cursor-pt";
  dot.style.background = plot.series[index].stroke();
  return dot;
}
