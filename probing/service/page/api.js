// What the page asks the server for.

export class Refused extends Error {
  constructor(status, problem) {
    super(`${problem.message ?? `status ${status}`}: ${problem.remedy ?? "try again"}`);
    this.status = status;
  }
}

// A URL with a key in it, as a reader may have typed it, cannot be asked relatively: the origin has none.
export async function get(parts, params = {}, signal = undefined) {
  const url = new URL(location.origin);
  url.pathname = parts.map(encodeURIComponent).join("/");
  for (const [name, value] of Object.entries(params)) {
    for (const one of [value].flat()) if (one !== null && one !== undefined && one !== "") url.searchParams.append(name, one);
  }
  const response = await fetch(url, { signal, headers: { Accept: "application/json" } });
  const body = await response.json().catch(() => ({}));
  if (!response.ok) throw new Refused(response.status, body);
  return { ready: response.status !== 202, body };
}

export const ask = async (...request) => (await get(...request)).body;

// What is computed first: asked for until it is there. waiting : is told what the server does meanwhile.
export async function wait(parts, params, signal, waiting) {
  let seconds = 0.2; // what is remembered is there at once, and what is not is said soon
  for (;;) {
    const { ready, body } = await get(parts, { ...params, wait: seconds }, signal);
    if (ready) return body;
    waiting(body.doing);
    seconds = 20;
  }
}

// Whether this server has a route: asking one that is not there would be an error in the browser's console.
let routes;
export async function has(path) {
  routes ??= ask(["openapi.json"]).then((found) => new Set(Object.keys(found.paths)));
  return (await routes).has(path);
}
