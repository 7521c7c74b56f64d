// Conversations on the person's own disk (IndexedDB), small preferences in localStorage. Knows no page.

const DATABASE = "kiloq";
const TABLE = "conversations";

export class Store {
  constructor(database) {
    this.database = database; // null: the browser keeps nothing for this page
  }

  static async open() {
    try {
      const request = indexedDB.open(DATABASE, 1);
      request.onupgradeneeded = () => request.result.createObjectStore(TABLE, { keyPath: "id" });
      const database = await done(request);
      database.onversionchange = () => database.close();
      return new Store(database);
    } catch {
      return new Store(null);
    }
  }

  get lasting() {
    return this.database !== null;
  }

  async all() {
    return this.database ? done(this.#table("readonly").getAll()) : [];
  }

  async get(id) {
    return this.database ? done(this.#table("readonly").get(id)) : undefined;
  }

  async put(conversation) {
    if (this.database) await this.#write((table) => table.put(conversation));
  }

  async remove(id) {
    if (this.database) await this.#write((table) => table.delete(id));
  }

  #write(act) {
    const table = this.#table("readwrite");
    act(table);
    const written = finished(table.transaction);
    table.transaction.commit(); // at once: the page may be going away
    return written;
  }

  #table(mode) {
    return this.database.transaction(TABLE, mode).objectStore(TABLE);
  }
}

function done(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
    request.onblocked = () => reject(new Error("blocked"));
  });
}

// A full disk shows when a transaction ends, not when the request does.
function finished(transaction) {
  return new Promise((resolve, reject) => {
    transaction.oncomplete = () => resolve();
    transaction.onabort = () => reject(transaction.error ?? new Error("aborted"));
    transaction.onerror = () => reject(transaction.error);
  });
}

const memory = new Map();

// What a tab keeps across reloads, and forgets when it is closed. No storage: it lasts as long as the page.
export function tabValue(name) {
  try {
    return sessionStorage.getItem(`kiloq.${name}`) ?? "";
  } catch {
    return memory.get(`tab ${name}`) ?? "";
  }
}

export function setTabValue(name, value) {
  memory.set(`tab ${name}`, value);
  try {
    sessionStorage.setItem(`kiloq.${name}`, value);
  } catch {}
}

export function preference(name, fallback) {
  try {
    return JSON.parse(localStorage.getItem(`kiloq.${name}`)) ?? memory.get(name) ?? fallback;
  } catch {
    return memory.get(name) ?? fallback;
  }
}

export function setPreference(name, value) {
  memory.set(name, value);
  try {
    localStorage.setItem(`kiloq.${name}`, JSON.stringify(value));
  } catch {} // full or forbidden: it lasts as long as the page
}
