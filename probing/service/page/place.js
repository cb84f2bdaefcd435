// Where the reader is: a path and parameters behind the address' #, so that a view can be linked and gone back to.

export function here() {
  const [path, query] = location.hash.replace(/^#/, "").split("?");
  return { path: path.split("/").filter(Boolean).map(decodeURIComponent), params: new URLSearchParams(query ?? "") };
}

export function href(path, params = {}) {
  const query = new URLSearchParams();
  for (const [name, value] of Object.entries(params)) if (value !== null && value !== undefined && value !== "") query.set(name, value);
  const text = query.toString();
  return `#/${path.map(encodeURIComponent).join("/")}${text ? `?${text}` : ""}`;
}

export function go(path, params) {
  location.hash = href(path, params);
}

// The same view with other parameters; null takes one away.
export function change(changes) {
  const { path, params } = here();
  go(path, { ...Object.fromEntries(params), ...changes });
}
