// The server: what it serves, and answers as they are written.

const KEY = "equipoise-key";
let key = sessionStorage.getItem(KEY) ?? "";

/** Keep a key for as long as the tab is open. */
export function useKey(given) {
  key = given;
  sessionStorage.setItem(KEY, given);
}

/** Whether the server is asked with a key. */
export const hasKey = () => key !== "";

/** An error that the server wrote, or that there is none to write one (status 0). */
export class ServerError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

async function asked(path, options = {}) {
  const headers = { ...(options.body && { "Content-Type": "application/json" }), ...(key && { Authorization: `Bearer ${key}` }) };
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError(0, "the server can't be reached: is it running?");
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  const after = response.headers.get("Retry-After");
  const message = body?.error?.message ?? `the server answered ${response.status}`;
  throw new ServerError(response.status, message + (after ? ` (in ${after} s)` : ""));
}

/** /v1/equipoise. Throws `ServerError`. */
export const about = async () => (await asked("v1/equipoise")).json();

/** Send a request, and give each choice of its stream to `tell` as it comes. Throws `ServerError`; `signal` aborts. */
export async function stream(body, tell, signal) {
  const response = await asked("v1/chat/completions", { method: "POST", body: JSON.stringify({ ...body, stream: true }), signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let kept = "";
  for (;;) {
    const { value, done } = await reader.read();
    const lines = (kept + (value ?? "")).split("\n");
    kept = done ? "" : lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ")) continue;
      if (line === "data: [DONE]") return;
      const event = JSON.parse(line.slice(6));
      if (event.error) throw new ServerError(200, event.error.message);
      for (const choice of event.choices) tell(choice);
    }
    if (done) throw new ServerError(0, "the server's answer broke off");
  }
}
