// The page's own addresses: #/search?q=..., so that back, forward, reload and a copied link work.

/** What the address says: the page's name and its parameters. */
export function here() {
  const found = /^#\/([a-z]*)(?:\?(.*))?$/.exec(location.hash);
  return { name: found?.[1] || "search", parameters: new URLSearchParams(found?.[2] ?? "") };
}

/** The address of a page. */
export function address(name, parameters = {}) {
  const query = new URLSearchParams(Object.entries(parameters).filter(([, value]) => value !== "" && value !== 0));
  return `#/${name}${query.size ? `?${query}` : ""}`;
}

/** Write what is shown into the address without a step in the history: typing is no navigation. */
export function note(name, parameters) {
  if (here().name !== name) return;
  try {
    history.replaceState(null, "", address(name, parameters));
  } catch {
    // Browsers allow so many in a while; the next one will do.
  }
}

/** Take a query along to the pages that ask something. */
export function carry(query) {
  for (const name of ["search", "compare", "ask"]) {
    document.querySelector(`nav [data-page="${name}"]`).setAttribute("href", address(name, { q: query }));
  }
}
