// Which words of a text a query has, and the part of a text that has most of them.

import { element } from "./elements.js";

const WORD = /[\p{L}\p{N}]+/gu;
const SHORT = 3; // letters; shorter words are in every text
const COMMON = new Set(
  ("and are but can did does for from had has have her his how its may not one our out she that the their them then " +
    "there they this was were what when where which who why will with you your").split(" "),
);
const EXCERPT = 230; // characters

/** The words of a query that are worth showing. */
export function wordsOf(query) {
  const all = [...query.toLowerCase().matchAll(WORD)].map(([word]) => word);
  return all.filter((word) => word.length >= SHORT && !COMMON.has(word));
}

/** A text as nodes, with the query's words (and words that begin alike) marked. */
export function marked(text, words) {
  const nodes = [];
  let end = 0;
  for (const match of text.matchAll(WORD)) {
    if (!fits(match[0].toLowerCase(), words)) continue;
    nodes.push(text.slice(end, match.index), element("mark", {}, match[0]));
    end = match.index + match[0].length;
  }
  nodes.push(text.slice(end));
  return nodes.filter((node) => node !== "");
}

/** The sentences around the one with most of the words, cut to a few lines. */
export function excerpt(text, words) {
  if (text.length <= EXCERPT) return text;
  const starts = [0, ...[...text.matchAll(/[.!?]\s+/g)].map((match) => match.index + match[0].length)];
  let best = 0;
  let most = 0;
  for (const start of starts) {
    const piece = text.slice(start, start + EXCERPT).toLowerCase();
    const found = new Set([...piece.matchAll(WORD)].filter(([word]) => fits(word, words)).map(([word]) => word)).size;
    if (found > most) [best, most] = [start, found];
  }
  const piece = text.slice(best, best + EXCERPT);
  const whole = best + EXCERPT < text.length ? `${piece.slice(0, piece.lastIndexOf(" "))} …` : piece;
  return best > 0 ? `… ${whole}` : whole;
}

function fits(word, words) {
  return words.some((wanted) => word === wanted || alike(word, wanted));
}

function alike(one, other) {
  const [short, long] = one.length < other.length ? [one, other] : [other, one];
  return short.length > SHORT && long.length - short.length <= 3 && long.startsWith(short);
}
