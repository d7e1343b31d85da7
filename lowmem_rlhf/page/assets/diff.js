// The words that two texts share, and those that one of them lacks.

const MOST_PAIRS = 4e6; // cells of the table of common subsequences; beyond it only both ends are compared

/** Return [kind, text] pieces, kind "same", "gone" (only in `before`) or "new" (only in `after`). */
function differences(before, after) {
  const a = before.match(/\s+|\w+|[^\s\w]/gu) ?? [], b = after.match(/\s+|\w+|[^\s\w]/gu) ?? [];
  let start = 0, end = 0;
  while (start < Math.min(a.length, b.length) && a[start] === b[start]) start += 1;
  while (end < Math.min(a.length, b.length) - start && a.at(-1 - end) === b.at(-1 - end)) end += 1;
  const middle = subsequence(a.slice(start, a.length - end), b.slice(start, b.length - end));
  const pieces = [["same", a.slice(0, start)], ...middle, ["same", a.slice(a.length - end)]];
  return pieces.map(([kind, words]) => [kind, words.join("")]).filter(([, text]) => text);
}

function subsequence(a, b) {
  if (!a.length || !b.length || a.length * b.length > MOST_PAIRS) return [["gone", a], ["new", b]];
  const width = b.length + 1, longest = new Uint32Array((a.length + 1) * width);
  for (let i = a.length - 1; i >= 0; i--) {
    for (let j = b.length - 1; j >= 0; j--) {
      longest[i * width + j] = a[i] === b[j]
        ? longest[(i + 1) * width + j + 1] + 1
        : Math.max(longest[(i + 1) * width + j], longest[i * width + j + 1]);
    }
  }
  const pieces = [];
  const push = (kind, word) => (pieces.at(-1)?.[0] === kind ? pieces.at(-1)[1].push(word) : pieces.push([kind, [word]]));
  let i = 0, j = 0;
  while (i < a.length && j < b.length) {
    if (a[i] === b[j]) push("same", a[i++]), j++;
    else if (longest[(i + 1) * width + j] >= longest[i * width + j + 1]) push("gone", a[i++]);
    else push("new", b[j++]);
  }
  if (i < a.length) pieces.push(["gone", a.slice(i)]);
  if (j < b.length) pieces.push(["new", b.slice(j)]);
  return pieces;
}

/** Return a text as one side of a comparison: what the other side lacks is marked, and said to a screen reader. */
function marked(pieces, kind) {
  const own = pieces.filter(([of]) => of === "same" || of === kind);
  return own.map(([of, text]) => (of === "same" ? text : el(kind === "gone" ? "del" : "ins", {}, text)));
}
