// The present request as code.

const OPENAI = ["model", "messages", "seed", "max_tokens", "temperature"];

/** A shell command. */
export function asCurl(body, base, withKey) {
  const quoted = JSON.stringify(body, null, 2).replaceAll("'", "'\\''");
  const lines = [`curl ${base}/chat/completions`, "-H 'Content-Type: application/json'"];
  if (withKey) lines.push('-H "Authorization: Bearer $EQUIPOISE_API_KEY"');
  return [...lines, `-d '${quoted}'`].join(" \\\n  ") + "\n";
}

/** A Python literal of a JSON value. */
export function literal(value, indent = "") {
  const inner = indent + "    ";
  if (value === null || value === undefined) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (typeof value !== "object") return JSON.stringify(value); // JSON's strings and numbers are Python's
  const array = Array.isArray(value);
  const pair = ([name, one]) => `${JSON.stringify(name)}: ${literal(one, inner)}`;
  const items = array ? value.map((one) => literal(one, inner)) : Object.entries(value).map(pair);
  const [open, close] = array ? "[]" : "{}";
  const short = `${open}${items.join(", ")}${close}`;
  return short.length <= 80 ? short : `${open}\n${items.map((item) => `${inner}${item},\n`).join("")}${indent}${close}`;
}

/** A Python program for OpenAI's client; what OpenAI has no field for goes into extra_body. */
export function asPython(body, base, withKey) {
  const own = Object.entries(body).filter(([name]) => OPENAI.includes(name));
  const extra = Object.fromEntries(Object.entries(body).filter(([name]) => !OPENAI.includes(name)));
  const given = [...own.map(([name, value]) => `    ${name}=${literal(value, "    ")},`), `    extra_body=${literal(extra, "    ")},`];
  return [
    ...(withKey ? ["import os", ""] : []),
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url=${JSON.stringify(base)}, api_key=${withKey ? 'os.environ["EQUIPOISE_API_KEY"]' : '"none"'})`,
    "answer = client.chat.completions.create(",
    ...given,
    ")",
    "print(answer.choices[0].message.content)",
    "print(answer.choices[0].equipoise)",
    "",
  ].join("\n");
}
