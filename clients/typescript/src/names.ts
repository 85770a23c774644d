/** Names of models, aliases and revisions, checked before they are sent. */

export function modelName(model: string): string {
  if (!/^[a-z0-9][a-z0-9._-]{0,62}$/.test(model)) {
    throw new TypeError(
      `model name "${model}" is not valid: use 1 to 63 characters out of a-z, 0-9, '-', '_' and '.', ` +
        "beginning with a letter or digit",
    );
  }
  return `models/${model}`;
}

export function checkedRevision(revision: number): number {
  if (!Number.isSafeInteger(revision) || revision < 1) {
    throw new RangeError(`revision must be 1 or more, not ${revision}`);
  }
  return revision;
}

/** Last part of a resource name. */
export function lastPart(name: string): string {
  return name.slice(name.lastIndexOf("/") + 1);
}

/** Which revision of a model a request is for; by default the alias "production". */
export interface Selection {
  /** A revision by number. */
  revision?: number;
  /** An alias, such as "candidate". */
  alias?: string;
  /** Requests with the same key get the same revision of a rollout. */
  stickyKey?: string;
}

export function checkedSelection(selection: Selection): void {
  if (selection.revision !== undefined && selection.alias !== undefined) {
    throw new TypeError("give a revision or an alias, not both");
  }
}
