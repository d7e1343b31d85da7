// The page: what it is made of, when each part is drawn, and how it follows runs that go on.

const POLL = 2000; // milliseconds
const GONE = "This run is no longer there: it was moved or deleted. What was read of it stays.";
const THEMES = ["auto", "light", "dark"];

const page = JSON.parse(byId("data").textContent);
const source = page.run ? new Embedded(page) : new Fetched(page.token);
const say = (text) => { byId("said").textContent = text; };
const charts = new Charts(byId("charts"), (text) => { byId("zoom").textContent = text; });
const samples = new Samples(byId("samples-body"), source);
const chat = source.live ? new Chat(byId("chat-body"), source) : null;
const store = new Map(); // id -> {run, columns}
let runs = [], opened = null, overlaid = [], listed = "";

/** Ask for what is new of a run, one question after the other; return whether there was anything. */
function follow(id, again) {
  const known = store.get(id) ?? { columns: new Columns(), asked: Promise.resolve() };
  store.set(id, known);
  known.asked = known.asked.catch(() => {}).then(() => ask(id, known, again));
  return known.asked;
}

async function ask(id, known, again) {
  if (!known.run || again) known.run = await source.run(id);
  const grown = known.columns.add(await source.columns(id, known.columns.last));
  if (grown === "anew") known.columns.add(await source.columns(id, 0));
  if (known.columns.step.length > 2500) { // as few points as at the beginning
    known.columns = new Columns();
    known.columns.add(await source.columns(id, 0));
  }
  known.columns.setHeldOut(known.run.evaluation);
  return Boolean(grown);
}

function drawCurves() {
  const shown = overlaid.length ? overlaid : [opened];
  const named = shown.map((id) => ({ id, ...store.get(id) })).filter((one) => one.run);
  const calls = [(run) => run.name, (run) => lastPart(run.path), (run) => run.path];
  const call = calls.find((of) => new Set(named.map((one) => of(one.run))).size === named.length) ?? calls.at(-1);
  charts.show(named.map((one) => ({ name: call(one.run), columns: one.columns })));
}

const lastPart = (path) => String(path).split(/[\\/]/).filter(Boolean).pop() ?? String(path);

/** Draw the parts of the opened run that its files decide. */
function drawRun() {
  const { run, columns } = store.get(opened);
  byId("name").textContent = run.name || "run";
  document.title = run.name ? `${run.name} · lowmem_rlhf` : "lowmem_rlhf";
  byId("about").textContent = [run.algorithm, run.model, source.live && run.path].filter(Boolean).join(" · ");
  byId("description").textContent = run.description ?? "";
  repaint(byId("remarks"), (host) => fill(host, (run.remarks ?? []).map((sentence) => el("li", {}, sentence))));
  repaint(byId("cards"), (host) => drawOverview(host, run, columns));
  repaint(byId("evaluation-body"), (host) => drawEvaluation(host, run));
  repaint(byId("memory-body"), (host) => drawMemory(host, run, columns));
  repaint(byId("time-body"), (host) => drawTime(host, run, columns));
  repaint(byId("plan-body"), (host) => drawPlan(host, run));
  repaint(byId("recipe-text"), (host) => fill(host, run.recipe ?? ""));
  repaint(byId("environment-table"), (host) => drawEnvironment(host, run));
  if (chat) showPart("chat", run.state === "finished");
}

function showPart(id, visible) {
  byId(id).hidden = !visible;
  const link = document.querySelector(`nav a[href="#${id}"]`);
  if (link) link.parentElement.hidden = !visible;
}

async function openRun(id) {
  opened = id;
  if (overlaid.length < 2) overlaid = [id];
  await follow(id, false);
  if (id !== opened) return;
  say("");
  drawRun();
  drawCurves();
  chat?.open(id, store.get(id).run);
  drawList();
  await samples.open(id, store.get(id).run);
}

async function overlay(id, on) {
  overlaid = on ? [...overlaid.filter((one) => one !== id), id] : overlaid.filter((one) => one !== id);
  drawList();
  await follow(id, false).catch((error) => say(error.message));
  drawCurves();
}

function drawList() {
  const key = JSON.stringify([runs.map((run) => ({ ...run, changed: null })), opened, overlaid]);
  if (key === listed) return; // a button that is being pressed stays where it is
  listed = key;
  drawRuns(byId("runs-body"), runs, {
    opened, overlaid, onOverlay: overlay, onOpen: (id) => openRun(id).catch((error) => say(error.message)),
  });
}

/** Look once for what is new of all that is shown. */
async function look() {
  runs = await source.runs();
  const there = new Set(runs.filter((run) => run.state !== "gone").map((run) => run.id));
  overlaid = overlaid.filter((id) => there.has(id));
  drawList();
  const cards = await source.gpu();
  repaint(byId("gpu-body"), (host) => drawGpu(host, cards));
  if (opened === null) return there.size ? openRun([...there][0]) : undefined;
  if (!there.has(opened)) return say(GONE);
  if (byId("said").textContent === GONE) say(""); // it has come back
  let grown = false;
  for (const id of new Set([opened, ...overlaid])) {
    const now = runs.find((run) => run.id === id), known = store.get(id)?.run;
    const changed = !known || known.state !== now.state || known.step !== now.step || known.changed !== now.changed;
    if (changed || now.state === "running") grown = (await follow(id, changed)) || changed || grown;
  }
  if (!grown) return undefined;
  drawRun();
  drawCurves();
  return samples.refresh(store.get(opened).run);
}

async function poll() {
  try {
    if (!document.hidden) {
      await look();
      if (byId("said").dataset.failed) say("");
      delete byId("said").dataset.failed;
    }
  } catch (error) {
    say(error.message);
    byId("said").dataset.failed = "true";
  }
  setTimeout(poll, POLL);
}

function setTheme(theme) {
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  byId("theme-name").textContent = theme;
  try { localStorage.setItem("theme", theme); } catch { /* a page from a file may keep nothing */ }
  charts.redraw();
}

function begin() {
  let theme = "auto";
  try { theme = localStorage.getItem("theme") ?? "auto"; } catch { /* as above */ }
  if (!THEMES.includes(theme)) theme = "auto";
  setTheme(theme);
  byId("theme").addEventListener("click", () => {
    theme = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
    setTheme(theme);
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => charts.redraw());
  const redraw = paused(() => charts.redraw(), 60);
  byId("smoothing").addEventListener("input", (event) => {
    charts.weight = Number(event.target.value);
    byId("smoothing-value").textContent = charts.weight.toFixed(2);
    redraw();
  });
  byId("log").addEventListener("change", (event) => { charts.log = event.target.checked; charts.redraw(); });
  byId("reset-zoom").addEventListener("click", () => charts.zoomTo(null));
  byId("charts").addEventListener("dblclick", () => charts.zoomTo(null));
  if (source.live) poll();
  else {
    ["runs", "gpu", "chat"].forEach((id) => showPart(id, false));
    source.runs().then(([run]) => openRun(run.id)).catch((error) => say(error.message));
  }
}

begin();
