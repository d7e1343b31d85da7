// Numbers as people read them, as `lowmem_rlhf.display.format` writes them.

const MISSING = "–";

const isNumber = (value) => typeof value === "number" && Number.isFinite(value);

/** Return three significant digits, and whole numbers as they are. */
function formatNumber(value) {
  if (!isNumber(value)) return MISSING;
  const size = Math.abs(value);
  if (Number.isInteger(value) && size < 1e9) return value.toLocaleString("en-US");
  if (size >= 1e9 || size < 1e-3) return Number(value.toPrecision(3)).toExponential();
  if (size >= 1000) return Math.round(value).toLocaleString("en-US");
  return String(Number(value.toPrecision(3)));
}

/** Return a tick of an axis: as many digits as it has. */
function formatTick(value) {
  const short = Number(value.toPrecision(6)), size = Math.abs(short);
  if (size >= 1e6 || (size > 0 && size < 1e-3)) return short.toExponential().replace("e+", "e");
  return short.toLocaleString("en-US", { maximumFractionDigits: 6 });
}

function formatPercent(value) {
  if (!isNumber(value)) return MISSING;
  const percent = 100 * value;
  return `${percent === 0 || Math.abs(percent) >= 1 ? percent.toFixed(1) : Number(percent.toPrecision(2))}%`;
}

/** Return GiB (2**30 bytes, what card makers call GB), or MiB below a tenth of one. */
function formatBytes(value) {
  if (!isNumber(value)) return MISSING;
  return Math.abs(value) >= 0.1 * 2 ** 30 ? `${(value / 2 ** 30).toFixed(2)} GiB` : `${Math.round(value / 2 ** 20)} MiB`;
}

/** Return `45s`, `2m10s` or `3h05m`. */
function formatSeconds(value) {
  if (!isNumber(value)) return MISSING;
  if (value < 10) return `${Number(value.toPrecision(2))}s`;
  const seconds = Math.round(value), two = (n) => String(n).padStart(2, "0");
  if (seconds < 60) return `${seconds}s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)}m${two(seconds % 60)}s`;
  return `${Math.floor(seconds / 3600)}h${two(Math.floor((seconds % 3600) / 60))}m`;
}

const isShare = (name) => /(^|[/ ])(accuracy|truncated)$|pass@\d+$/.test(name);

/** Return a measure of an evaluation: an accuracy and other shares in percent. */
function formatMeasure(name, value) {
  return isShare(name) ? formatPercent(value) : formatNumber(value);
}

/** Return a measure with its interval: `72.5% [65.7%, 78.3%]`. */
function withInterval(name, value, bounds) {
  const text = formatMeasure(name, value);
  return bounds ? `${text} [${bounds.map((bound) => formatMeasure(name, bound)).join(", ")}]` : text;
}

/** Return a setting's value as a recipe would write it. */
function formatValue(value) {
  if (value === null || value === undefined) return "none";
  if (Array.isArray(value)) return value.map(formatValue).join(", ");
  if (typeof value === "object") return Object.entries(value).map(([k, v]) => `${k}=${formatValue(v)}`).join(", ");
  return String(value);
}

/** Return any value as text: a conversation as its messages. */
function textOf(value) {
  if (typeof value === "string") return value;
  if (isConversation(value)) return value.map((m) => `${m.role ?? ""}: ${textOf(m.content)}`).join("\n");
  if (value === null || value === undefined) return "";
  return isNumber(value) ? formatNumber(value) : JSON.stringify(value);
}

const isConversation = (value) =>
  Array.isArray(value) && value.length > 0 && value.every((m) => m && typeof m === "object" && "content" in m);

const inWords = (measure) => (measure === "reward/mean" ? "mean reward" : measure.replaceAll("_", " "));

const counted = (count, noun) => `${isNumber(count) ? count.toLocaleString("en-US") : textOf(count)} ${noun}${count === 1 ? "" : "s"}`;
